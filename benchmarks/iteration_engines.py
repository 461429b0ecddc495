"""Whole GRPO iterations of a toy task by one engine, in a process of its own: see `iteration.py`.

Prompts are texts of random token numbers, and the reward of a response is how many even numbers it
has. Each engine is called with a model's folder and a job, and tells when its iterations ended.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import peers
from benchmarks.peer_trainers import EPSILON, one_device_mesh
from spo_jax.batches import sample
from spo_jax.config import (
  AdvantageConfig,
  Config,
  LossConfig,
  OptimizerConfig,
  PackingConfig,
  RolloutConfig,
)
from spo_jax.infra.mesh import make_mesh
from spo_jax.infra.progress import Progress
from spo_jax.learner import Learner
from spo_jax.models.families import config_from_hf
from spo_jax.models.pretrained import find_pretrained
from spo_jax.run import Run
from spo_jax.sampling.strategies import Prompts
from spo_jax.train import choose
from spo_jax.training.estimate import estimate
from spo_jax.training.optimizer import make_optimizer

OPTIMIZER = OptimizerConfig(learning_rate=1e-5)
NEVER = (-1,)  # stop ids of which none is ever drawn


@dataclasses.dataclass(frozen=True)
class Job:
  """What an engine does."""

  iterations: int
  prompts: int  # an iteration
  samples: int  # of a prompt
  prompt: int  # tokens of a prompt
  new: int  # tokens of a response, of which none ends early
  vocab: int


@dataclasses.dataclass
class Timeline:
  """What an engine tells."""

  ends: list[float]  # seconds from when the model was made to the end of each iteration
  rewards: list[float]  # means of the iterations
  parts: dict[str, list[float]]  # seconds of parts of the iterations, where they are known


def prompt_texts(job: Job, iteration: int) -> list[str]:
  """The prompts of an iteration."""
  numbers = np.random.default_rng(iteration).integers(0, job.vocab, (job.prompts, job.prompt))
  return [" ".join(map(str, row)) for row in numbers]


def even_numbers(text: str) -> float:
  """The reward."""
  return float(sum(int(word) % 2 == 0 for word in text.split()))


class NumberTask:
  """Stands in for `spo_jax.task.Task`."""

  stop_ids = NEVER

  def __init__(self, vocab: int):
    self._tokenizer = peers.Numbers(vocab)

  def prompts(self, records: list[dict[str, Any]], key: jax.Array, ids: str) -> Prompts:
    tokens = np.array([self._tokenizer.encode(r["question"]) for r in records], np.int32)
    numbers = np.array([r[ids] for r in records], np.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    return Prompts(tokens, np.full(len(records), tokens.shape[1], np.int32), keys)

  def texts(self, responses: list[np.ndarray]) -> list[str]:
    return [self._tokenizer.decode(response) for response in responses]

  def grade(self, texts: list[str], answers: list[str], *, shaped: bool):
    return np.array([even_numbers(text) for text in texts], np.float32), np.zeros(len(texts), bool)


def grpo_config(job: Job) -> Config:
  """One update an iteration, without a reference policy; a packed row holds a whole group, and a
  micro-batch a row: on a CPU few are best. A chunk of logits holds the group's responses."""
  row = job.prompt + job.samples * job.new
  return Config(
    iterations=job.iterations,
    rollout=RolloutConfig(
      strategy="group",
      prompts=job.prompts,
      samples=job.samples,
      max_prompt_tokens=job.prompt,
      max_response_tokens=job.new,
    ),
    advantage=AdvantageConfig(kind="normalized", grade_unfinished=True),
    loss=LossConfig(
      use_probability_mask=False,
      scaling="none",
      kl_coef=0.0,
      epsilon_low=EPSILON,
      epsilon_high=EPSILON,
    ),
    packing=PackingConfig(
      row_length=row, rows=1, query_block=row, key_block=row, logprob_chunk=job.samples * job.new
    ),
    optimizer=OPTIMIZER,
  )


def ours(folder: pathlib.Path, job: Job) -> Timeline:
  """What `spo_jax.train.train` does in an iteration, without its files."""
  config = grpo_config(job)
  mesh = make_mesh(1, 1, 1)
  pretrained = find_pretrained(str(folder))
  model = config_from_hf(pretrained.hf).on(mesh)
  run = Run(
    config, folder, Progress(job.iterations), mesh, model, pretrained, NumberTask(job.vocab)
  )
  params = run.initial_params()
  told = Timeline([], [], {})
  began = time.perf_counter()
  learner = Learner(run, params)
  for iteration in range(job.iterations):
    records = [
      {"question": text, "answer": "", "ordinal": iteration * job.prompts + i}
      for i, text in enumerate(prompt_texts(job, iteration))
    ]
    forest, rewards, metrics = sample(run, learner.params, records)
    estimated = estimate(forest, rewards, config.advantage, probed=False)
    chosen, _ = choose(run, iteration, records, forest, rewards, estimated, buffer=None)
    metrics |= learner.update(chosen)
    told.ends.append(time.perf_counter() - began)
    told.rewards.append(metrics["train/reward_mean"])
    for name in ("rollout", "grade", "pack", "update"):
      told.parts.setdefault(name, []).append(metrics[f"time/{name}_s"])
  return told


def tunix(folder: pathlib.Path, job: Job) -> Timeline:
  """google-tunix's own cluster and learner, rollout and training on one mesh."""
  from tunix.rl import rl_cluster
  from tunix.rl.grpo import grpo_learner
  from tunix.rl.rollout import base_rollout

  mesh = one_device_mesh()
  model = peers.tunix_model(folder, mesh)
  told = Timeline([], [], {})
  began = time.perf_counter()

  def reward(prompts: list[str], completions: list[str], **_) -> list[float]:
    rewards = [even_numbers(text) for text in completions]
    told.rewards.append(float(np.mean(rewards)))
    return rewards

  def batches() -> Iterator[dict[str, np.ndarray]]:
    # A batch is asked for when the update before it has been waited for.
    for iteration in range(job.iterations):
      yield {"prompts": np.array(prompt_texts(job, iteration))}
      told.ends.append(time.perf_counter() - began)

  never = job.iterations + 1
  roles = rl_cluster.Role
  config = rl_cluster.ClusterConfig(
    role_to_mesh=dict.fromkeys((roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), mesh),
    training_config=rl_cluster.RLTrainingConfig(
      actor_optimizer=make_optimizer(OPTIMIZER), eval_every_n_steps=never, max_steps=never
    ),
    rollout_config=base_rollout.RolloutConfig(
      max_tokens_to_generate=job.new,
      max_prompt_length=job.prompt,
      kv_cache_size=job.prompt + job.new,
      temperature=1.0,
    ),
  )
  cluster = rl_cluster.RLCluster(
    actor=model, tokenizer=peers.Numbers(job.vocab), cluster_config=config
  )
  grpo = grpo_learner.GRPOConfig(num_generations=job.samples, beta=0.0, epsilon=EPSILON)
  grpo_learner.GRPOLearner(cluster, grpo, reward).train(batches())
  return told


ENGINES: dict[str, Callable[[pathlib.Path, Job], Timeline]] = {"ours": ours, "tunix": tunix}


def main(name: str, folder: str, job: str) -> None:
  """Prints a line of JSON."""
  told = ENGINES[name](pathlib.Path(folder), Job(**json.loads(job)))
  print(json.dumps(dataclasses.asdict(told)))


if __name__ == "__main__":
  main(*sys.argv[1:])
