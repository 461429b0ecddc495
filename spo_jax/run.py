"""What a run works with, made once from its config: tokenizer, mesh, model, prompts, samplers."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from spo_jax import rewards
from spo_jax.config import Config, ModelConfig
from spo_jax.config_check import check_mesh
from spo_jax.data import prompts as prompting
from spo_jax.data import source
from spo_jax.data.sets import Fields
from spo_jax.data.tokenizer import check_tokenizer, load_tokenizer
from spo_jax.errors import UserError
from spo_jax.forest import Forest
from spo_jax.infra.mesh import make_mesh, param_shardings, row_shards
from spo_jax.infra.progress import Progress
from spo_jax.models.decoder import DecoderConfig, LayerKind, init_params
from spo_jax.models.rope import Rope
from spo_jax.sampling.sampler import Sampler
from spo_jax.sampling.strategies import Prompts
from spo_jax.sampling.token import SamplingConfig
from spo_jax.training.optimizer import OptimizerConfig
from spo_jax.training.step import TrainState, init_state


@dataclasses.dataclass(frozen=True)
class Run:
  """The fixed parts of a run."""

  config: Config
  workdir: pathlib.Path
  tokenizer: Any  # a Hugging Face tokenizer
  mesh: jax.sharding.Mesh
  model: DecoderConfig
  progress: Progress
  grader: rewards.Grader | rewards.GraderPool
  template: prompting.Template  # of prompts
  stop_ids: tuple[int, ...]  # see `prompts.stop_ids`; sampling ends a response at the first alone
  _splits: dict[str, Sequence[dict[str, Any]]] = dataclasses.field(default_factory=dict)

  def key(self, stream: str) -> jax.Array:
    """The root key of a named stream of random numbers."""
    streams = ("params", "rollout", "eval", "warm_start")
    return jax.random.fold_in(jax.random.key(self.config.seed), streams.index(stream))

  def split(self, name: str) -> Sequence[dict[str, Any]]:
    """Records of a split, without those whose prompts are too long; see `source.load_split`.

    The embedded task's prompts fit, and a prompt that does not is a mistake.
    """
    if name not in self._splits:
      self._splits[name] = self._load_split(name)
    return self._splits[name]

  def _load_split(self, name: str) -> Sequence[dict[str, Any]]:
    data = self.config.data
    records = source.load_split(
      data.name,
      data.variant,
      name,
      data.data_dir or str(self.workdir / "data"),
      manual_dir=data.manual_dir,
      fields=Fields(data.question_field, data.answer_field),
    )
    if data.name == source.EMBEDDED:
      return records
    limit = self.config.rollout.max_prompt_tokens
    kept = source.keep_short_prompts(records, self.tokenizer, self.template, limit)
    if dropped := len(records) - len(kept):
      self.progress.note(
        f"{data.name} {name}: {dropped} of {len(records)} prompts have more than {limit} tokens "
        "and are left out"
      )
    return kept

  def sampler(self, *, temperature: float, truncate: bool) -> Sampler:
    """The compiled verbs at a temperature; `truncate` applies the rollouts' top-k and top-p."""
    rollout = self.config.rollout
    sampling = SamplingConfig(
      temperature=temperature,
      top_k=rollout.top_k if truncate else 0,
      top_p=rollout.top_p if truncate else 1.0,
    )
    return Sampler(
      cfg=self.model,
      mesh=self.mesh,
      eos_id=self.stop_ids[0],
      sampling=sampling,
      slots=rollout.slots,
      refill_share=rollout.refill_share,
    )

  def prompts(self, records: Sequence[dict[str, Any]], key: jax.Array, ids: str) -> Prompts:
    """Tokenises records; a prompt's key is folded from its field `ids`, whatever the batch is."""
    tokens, lengths = source.encode_prompts(
      self.tokenizer,
      [r["question"] for r in records],
      self.config.rollout.max_prompt_tokens,
      self.template,
    )
    numbers = np.asarray([int(r[ids]) for r in records], np.uint32)
    return Prompts(tokens, lengths, jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))

  def grade(
    self,
    forest: Forest,
    records: Sequence[dict[str, Any]],
    leaves: np.ndarray,
    *,
    shaped: bool = False,
  ) -> tuple[np.ndarray, int]:
    """Rewards of leaves, each on its response alone; and how many times the grader failed.

    Args:
      forest: the rollout; tree i answers `records[i]`.
      records: with the field `answer`.
      leaves: [k] node ids.
      shaped: rewards to train on, with the config's penalty of format; else those that count.

    Returns:
      ([k] float32, failures).
    """
    texts = self.tokenizer.batch_decode(
      [forest.response(leaf) for leaf in leaves], skip_special_tokens=True
    )
    answers = [records[tree]["answer"] for tree in forest.tree[leaves]]
    graded, failures = rewards.grade_all(texts, answers, self.grader)
    if shaped:
      graded = rewards.shape(graded, texts, self.config.data.repeated_marker_reward)
    return graded, failures

  def close(self) -> None:
    """Ends the grader's processes."""
    rewards.close_grader(self.grader)

  def initial_state(self, optimizer: OptimizerConfig) -> TrainState:
    """Random parameters and an empty optimiser, sharded from the start."""
    key = self.key("params")
    shapes = jax.eval_shape(lambda: init_params(self.model, key))
    make = lambda: nn.unbox(init_params(self.model, key))
    params = jax.jit(make, out_shardings=param_shardings(self.mesh, shapes))()
    return init_state(params, optimizer)


def make_run(config: Config, workdir: pathlib.Path, progress: Progress) -> Run:
  """Builds the parts of a run and checks them against each other. The caller closes it.

  Raises:
    UserError: if a batch does not divide over the mesh, the tokenizer lacks a token or does not
      go with the template, or the grader is unknown or cannot be loaded.
  """
  mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  check_mesh(config, row_shards(mesh))
  tokenizer = load_tokenizer(config.data.tokenizer, work_dir=str(workdir))
  check_tokenizer(tokenizer, len(tokenizer))
  template = prompting.parse_template(config.data.template, config.data.system)
  template.render(tokenizer, "?")  # a chat template may be missing, or refuse a system turn
  stop_ids = prompting.stop_ids(tokenizer, template, config.data.tokenizer)
  if len(stop_ids) > 1:
    used, *others = tokenizer.convert_ids_to_tokens(stop_ids)
    progress.note(f"responses end at {used}; at {', '.join(others)} sampling does not stop")
  model = decoder_config(config.model, len(tokenizer))
  data = config.data
  grader = rewards.open_grader(
    data.grader,
    workers=data.grader_workers,
    timeout_s=data.grader_timeout_s,
    memory_mb=data.grader_memory_mb,
  )
  return Run(config, workdir, tokenizer, mesh, model, progress, grader, template, stop_ids)


def decoder_config(model: ModelConfig, vocab_size: int) -> DecoderConfig:
  """The decoder that the run's config describes: every layer sees all, RoPE is not scaled."""
  fields = dataclasses.asdict(model)
  kinds = (LayerKind(Rope(fields.pop("rope_theta"), "exact")),)
  return DecoderConfig(vocab_size=vocab_size, layer_kinds=kinds, **fields)


def delimiter_ids(tokenizer, delimiter: str) -> tuple[int, ...]:
  """Ids of the tokens that end a segment under the delimiter partition.

  Raises:
    UserError: if the delimiter is not one token.
  """
  ids = tokenizer(delimiter, add_special_tokens=False)["input_ids"]
  if len(ids) != 1:
    raise UserError(f"config.partition.delimiter {delimiter!r} is {len(ids)} tokens, not one")
  return tuple(ids)
