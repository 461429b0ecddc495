"""What a training run works with, made once from its config: task, mesh, model, samplers."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
from flax import linen as nn

from spo_jax.algorithms.partition import make_partition
from spo_jax.config import ComputeConfig, Config, NewModelConfig, RolloutConfig
from spo_jax.config_rules import check_ahead, check_mesh
from spo_jax.errors import UserError
from spo_jax.infra.mesh import make_mesh, packed_row_shards, param_shardings, row_shards
from spo_jax.infra.progress import Progress
from spo_jax.models.attention import check_backend
from spo_jax.models.decoder import DecoderConfig, LayerKind, init_params
from spo_jax.models.export import export_model, llama_config
from spo_jax.models.families import config_from_hf
from spo_jax.models.pretrained import Pretrained, check_tensors, find_pretrained, load_params
from spo_jax.models.rope import Rope
from spo_jax.sampling.sampler import Sampler
from spo_jax.sampling.strategies import Partition
from spo_jax.sampling.token import SamplingConfig
from spo_jax.task import Task, open_task


@dataclasses.dataclass(frozen=True)
class Run:
  """The fixed parts of a run."""

  config: Config
  workdir: pathlib.Path
  progress: Progress
  mesh: jax.sharding.Mesh
  model: DecoderConfig
  pretrained: Pretrained | None  # None: parameters are random at first
  task: Task

  def key(self, stream: str) -> jax.Array:
    """The root key of a named stream of random numbers."""
    streams = ("params", "rollout", "eval", "warm_start")
    return jax.random.fold_in(jax.random.key(self.config.seed), streams.index(stream))

  def checkpoint_folder(self, name: str) -> str:
    """Where checkpoints of a kind are: in `config.checkpoint.folder`, or else in the workdir."""
    return os.path.join(self.config.checkpoint.folder or self.workdir, name)

  def sampler(self, *, temperature: float, as_rollout: bool) -> Sampler:
    """The compiled verbs at a temperature, as rollouts are drawn or as the policy is."""
    return make_sampler(
      self.config.rollout,
      self.model,
      self.mesh,
      self.task.stop_ids,
      temperature=temperature,
      as_rollout=as_rollout,
    )

  def partition(self) -> Partition:
    """Where the segments of a chain begin, by the config."""
    fields = self.config.partition
    delimiters = ()
    if fields.kind == "delimiter":
      delimiters = delimiter_ids(self.task.tokenizer, fields.delimiter)
    return make_partition(
      fields.kind,
      threshold=self.config.probability_threshold,
      interval=fields.interval,
      length=fields.length,
      parts=fields.parts,
      delimiter_ids=delimiters,
    )

  def initial_params(self) -> Any:
    """The checkpoint's parameters, or random ones; sharded from the start."""
    if self.pretrained is not None:
      return load_params(self.pretrained, self.model, self.mesh)
    key = self.key("params")
    shapes = jax.eval_shape(lambda: init_params(self.model, key))
    make = lambda: nn.unbox(init_params(self.model, key))
    return jax.jit(make, out_shardings=param_shardings(self.mesh, shapes))()

  def export(self, params: Any, folder: pathlib.Path) -> None:
    """Writes the policy as a Hugging Face model; see `export.export_model`."""
    if self.pretrained is not None:
      hf = self.pretrained.hf
    else:
      context = sum(self.config.longest_segments)
      hf = llama_config(self.model, context, self.task.tokenizer)
    export_model(params, self.model, hf, self.task.tokenizer, folder, source=self.pretrained)
    self.progress.note(f"exported: {folder}")

  def close(self) -> None:
    """Ends the grader's processes."""
    self.task.close()


def make_run(config: Config, workdir: pathlib.Path, progress: Progress) -> Run:
  """Builds the parts of a run and checks them against each other. The caller closes it.

  Raises:
    UserError: if a batch does not divide over the mesh, or it is too large for
      `config.rollout.ahead`, the model or its attention cannot be used,
      or no token has the delimiter of the partition; see `open_task` for what the data may lack.
  """
  mesh = make_mesh(**dataclasses.asdict(config.mesh))
  check_mesh(config, row_shards(mesh), packed_row_shards(mesh))
  check_ahead(config, mesh.size)
  pretrained = model = None
  shape, cap = config.new_model, None
  if config.model:
    pretrained = find_pretrained(config.model)
    model = pretrained_decoder(pretrained, config.compute)
    check_tensors(pretrained, model)
    shape, cap = model, model.attention_cap
  check_backend(
    config.compute.attention,
    mesh.devices.flat[0],
    dtype=config.compute.dtype,
    head_dim=shape.head_dim,
    cap=cap,
    group=shape.heads // shape.kv_heads,
    packed_blocks=(config.packing.query_block, config.packing.key_block),
  )
  task = open_task(
    config.data,
    max_prompt_tokens=config.rollout.max_prompt_tokens,
    workdir=workdir,
    model_folder=pretrained and pretrained.folder,
    vocab_size=model and model.vocab_size,
    note=progress.note,
  )
  if model is None:
    model = new_decoder(config.new_model, config.compute, len(task.tokenizer))
  run = Run(config, workdir, progress, mesh, model.on(mesh), pretrained, task)
  run.partition()  # its delimiter may be in no token
  return run


def make_sampler(
  rollout: RolloutConfig,
  model: DecoderConfig,
  mesh: jax.sharding.Mesh,
  stop_ids: tuple[int, ...],
  *,
  temperature: float,
  as_rollout: bool,
) -> Sampler:
  """The compiled verbs at a temperature.

  `as_rollout` applies the rollouts' top-k, top-p and quantisation; else the policy itself is drawn
  from.
  """
  sampling = SamplingConfig(
    temperature=temperature,
    top_k=rollout.top_k if as_rollout else 0,
    top_p=rollout.top_p if as_rollout else 1.0,
  )
  return Sampler(
    cfg=model,
    mesh=mesh,
    stop_ids=stop_ids,
    sampling=sampling,
    slots=rollout.slots,
    refill_share=rollout.refill_share,
    suffix_chunks=rollout.suffix_chunks,
    prefill_chunk=rollout.prefill_chunk,
    weights=rollout.weights if as_rollout else "full",
    cache=rollout.cache if as_rollout else "full",
  )


def pretrained_decoder(pretrained: Pretrained, compute: ComputeConfig) -> DecoderConfig:
  """The decoder of a checkpoint's config.json; see `families.config_from_hf`."""
  return config_from_hf(pretrained.hf, **dataclasses.asdict(compute))


def new_decoder(new: NewModelConfig, compute: ComputeConfig, vocab_size: int) -> DecoderConfig:
  """The decoder that a config describes: every layer sees all, RoPE is not scaled."""
  fields = dataclasses.asdict(new) | dataclasses.asdict(compute)
  kinds = (LayerKind(Rope(fields.pop("rope_theta"), "exact")),)
  return DecoderConfig(vocab_size=vocab_size, layer_kinds=kinds, **fields)


@functools.cache
def delimiter_ids(tokenizer, delimiter: str) -> tuple[int, ...]:
  """Ids of the tokens with the delimiter in their text: each ends a segment of that partition.

  With the delimiter "\\n" these are "\\n", "\\n\\n", ".\\n" and all such. A delimiter of several
  characters is not seen where it is spread over tokens.

  Raises:
    UserError: if there is no such token, or the delimiter is empty.
  """
  if not delimiter:
    raise UserError("config.partition.delimiter is empty")
  # Behind another token, as a decoder may drop the space that begins a text.
  front = tokenizer(delimiter, add_special_tokens=False)["input_ids"][:1]
  texts = tokenizer.batch_decode([front] + [[*front, i] for i in range(len(tokenizer))])
  ids = tuple(i for i, text in enumerate(texts[1:]) if delimiter in text[len(texts[0]) :])
  if not ids:
    raise UserError(f"config.partition.delimiter {delimiter!r} is in no token of the tokenizer")
  return ids
