"""A policy over responses of at most three tokens, so few that all of them can be written out."""

import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.config import Config
from spo_jax.infra.mesh import make_mesh
from spo_jax.models.attention import attend_prefill
from spo_jax.models.decoder import forward, token_logits
from spo_jax.run import Run
from spo_jax.sampling.strategies import Prompts
from tests.tiny import EOS, tiny_config, tiny_params

VOCAB, LONGEST = 5, 3
PROMPTS = ((2, 3), (4, 2, 3))
LETTERS = "ab;cd"
WIDTH = 3  # of the table of prompts
RECORDS = 1024  # each prompt as often as the others; shuffling so few as two is slow


class Letters:
  """A tokenizer whose tokens are the letters of `LETTERS`."""

  def __call__(self, text, **_):
    return {"input_ids": [LETTERS.index(letter) for letter in text]}

  def batch_decode(self, rows, **_):
    return ["".join(LETTERS[token] for token in row) for row in rows]

  def __len__(self):
    return VOCAB


class World:
  """What a `Task` is asked, with tokens for texts: the reward is of a sum of tokens."""

  stop_ids = (EOS,)
  tokenizer = Letters()

  def split(self, name):
    return [{"id": i, "answer": i % len(PROMPTS)} for i in range(RECORDS)]

  def prompts(self, records, key, ids):
    tokens = np.zeros((len(records), WIDTH), np.int32)
    lengths = np.array([len(PROMPTS[r["answer"]]) for r in records], np.int32)
    for row, record in zip(tokens, records, strict=True):
      row[: len(PROMPTS[record["answer"]])] = PROMPTS[record["answer"]]
    numbers = np.array([r[ids] for r in records], np.uint32)
    return Prompts(tokens, lengths, jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))

  def texts(self, responses):
    return list(responses)

  def grade(self, texts, answers, *, shaped=False):
    rewards = [reward(text, answer) for text, answer in zip(texts, answers, strict=True)]
    return np.array(rewards, np.float32), np.zeros(len(texts), bool)


def reward(response, answer: int) -> float:
  return float((sum(map(int, response)) + answer) % 3 == 0)


class Silent:
  """A progress that shows nothing."""

  def bar(self, *_, **__):
    return self

  def note(self, text):
    pass

  def __enter__(self):
    return lambda *_, **__: None

  def __exit__(self, *_):
    pass


@functools.cache
def make_world(**rollout) -> tuple[Run, dict]:
  """A run in this world, and the policy's parameters."""
  model = tiny_config(vocab_size=VOCAB, layers=1)
  params = tiny_params(model)
  config = Config()
  fields = {
    "max_prompt_tokens": WIDTH,
    "max_response_tokens": LONGEST,
    "segment_tokens": (1,),
    "branches": (2, 2),
    "strategy": "group",
  }
  packing = dataclasses.replace(
    config.packing, row_length=32, rows=64, query_block=16, key_block=8, logprob_chunk=32
  )
  config = dataclasses.replace(
    config,
    rollout=dataclasses.replace(config.rollout, **(fields | rollout)),
    packing=packing,
    loss=dataclasses.replace(config.loss, kl_coef=0.0, scaling="none", use_probability_mask=False),
    advantage=dataclasses.replace(
      config.advantage, kind="leave_one_out", train_zero=True, grade_unfinished=True
    ),
  )
  return Run(config, pathlib.Path(), Silent(), make_mesh(1, 1, 1), model, None, World()), params


def responses() -> list[tuple[int, ...]]:
  """All responses: they end with EOS or have LONGEST tokens."""
  found = []
  for length in range(1, LONGEST + 1):
    for tokens in itertools.product(range(VOCAB), repeat=length):
      ended = EOS not in tokens[:-1] and (tokens[-1] == EOS or length == LONGEST)
      if ended:
        found.append(tokens)
  return found


def log_likelihoods(run, params, prompt, answers) -> jax.Array:
  """[responses] log-probs, of whole sequences through the model."""
  width = len(prompt) + LONGEST
  table = np.zeros((len(answers), width), np.int32)
  mask = np.zeros((len(answers), width), bool)
  for row, own, response in zip(table, mask, answers, strict=True):
    row[: len(prompt) + len(response)] = [*prompt, *response]
    own[len(prompt) : len(prompt) + len(response)] = True
  positions = jnp.broadcast_to(jnp.arange(width), table.shape)
  hidden, _ = forward(run.model, attend_prefill, params, jnp.asarray(table), positions)
  logprobs = jax.nn.log_softmax(token_logits(run.model, params, hidden[:, :-1]))
  taken = jnp.take_along_axis(logprobs, table[:, 1:, None], axis=-1)[..., 0]
  return jnp.where(mask[:, 1:], taken, 0).sum(1)


def objective(run, params) -> jax.Array:
  """J: the mean over prompts of the expected reward, by all responses."""
  total = 0.0
  for answer, prompt in enumerate(PROMPTS):
    every = responses()
    rewards = jnp.array([reward(r, answer) for r in every])
    total += jnp.sum(jnp.exp(log_likelihoods(run, params, prompt, every)) * rewards)
  return total / len(PROMPTS)


def distribution(run, params, answer: int) -> dict[tuple[int, ...], float]:
  """The probability of every response to a prompt."""
  every = responses()
  likelihoods = jax.jit(lambda params: log_likelihoods(run, params, PROMPTS[answer], every))
  chances = np.exp(np.array(likelihoods(params), np.float64))
  return dict(zip(every, chances, strict=True))


def value(chances, answer: int, prefix) -> float:
  """V* of a prompt and the first tokens of a response."""
  begun = [r for r in chances if r[: len(prefix)] == tuple(prefix)]
  return float(np.average([reward(r, answer) for r in begun], weights=[chances[r] for r in begun]))
