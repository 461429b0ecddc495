"""From what the user wrote to a `Config`: types, names and values are checked before anything is
built or compiled.
"""

import dataclasses
import difflib
import functools
import typing
from typing import Any

import ml_collections

from spo_jax.config import Config
from spo_jax.data.prompts import parse_template
from spo_jax.errors import UserError

_POSITIVE = (
  "iterations",
  "minibatches",
  "probability_threshold",
  "model.layers",
  "optimizer.learning_rate",
  "rollout.prompts",
  "rollout.samples",
  "rollout.probes",
  "rollout.cuts_per_group",
  "rollout.max_prompt_tokens",
  "rollout.slots",
  "partition.interval",
  "partition.length",
  "packing.rows",
  "packing.query_block",
  "packing.key_block",
  "packing.logprob_chunk",
  "eval.every",
  "eval.prompts",
  "checkpoint.every",
  "checkpoint.keep",
  "data.grader_timeout_s",
  "data.grader_memory_mb",
  "warm_start.batch_size",
  "warm_start.eval_every",
  "warm_start.eval_prompts",
)
_CHOICES = {
  "rollout.strategy": ("tree", "chain", "group"),
  "partition.kind": ("adaptive", "fixed", "token", "response", "delimiter"),
  "advantage.kind": ("difference", "normalized", "leave_one_out"),
  "loss.scaling": ("whiten", "rescale", "none"),
  # "seq_control_variate" sums over a row, and a packed row holds many responses.
  "loss.kl_estimator": ("kl", "abs", "mse", "control_variate"),
  "model.dtype": ("float32", "bfloat16"),
}
_SPLIT_BATCHES = (
  "rollout.prompts",
  "rollout.slots",
  "packing.rows",
  "eval.prompts",
  "warm_start.eval_prompts",
)


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
  """The typed config of a run, checked.

  Raises:
    UserError: if a field is missing, unknown, of another type, or has a value that cannot work.
  """
  built = _build(Config, config.to_dict(), "config")
  _check(built)
  return built


def check_field(path: str) -> None:
  """Checks that a dotted name, such as `rollout.prompts`, is a field of the config.

  Raises:
    UserError: if it is not, with the nearest name that is.
  """
  cls, where = Config, "config"
  for name in path.split("."):
    if not dataclasses.is_dataclass(cls):
      raise UserError(f"{where} is a {cls.__name__} and has no field {name!r}")
    _check_name(cls, name, where)
    cls, where = typing.get_type_hints(cls)[name], f"{where}.{name}"


def _check_name(cls, name: str, where: str) -> None:
  fields = [field.name for field in dataclasses.fields(cls)]
  if name not in fields:
    close = difflib.get_close_matches(name, fields, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(fields)}"
    raise UserError(f"{where} has no field {name!r}, {hint}")


def _build(cls, values: dict[str, Any], where: str):
  for name in values:
    _check_name(cls, name, where)
  types = typing.get_type_hints(cls)
  built = {}
  for name in types:
    if name not in values:
      raise UserError(f"{where}.{name} is missing")
    built[name] = _convert(types[name], values[name], f"{where}.{name}")
  return cls(**built)


def _convert(kind, value, where: str):
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, where)
  if typing.get_origin(kind) is tuple:
    if isinstance(value, list | tuple) and all(type(item) is int for item in value):
      return tuple(value)
    raise UserError(f"{where} is {value!r}, it must be a tuple of whole numbers")
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise UserError(f"{where} is {value!r}, it must be of type {kind.__name__}")
  return value


def _check(config: Config) -> None:
  for name in _POSITIVE:
    value = _field(config, name)
    _need(value > 0, f"config.{name} is {value}, it must be positive")
  for name, known in _CHOICES.items():
    value = _field(config, name)
    _need(value in known, f"config.{name} is {value!r}, it must be one of: {', '.join(known)}")
  _check_data(config)
  _check_model(config)
  _check_optimizers(config)
  _check_rollout(config)
  _check_packing(config)


def _field(config: Config, name: str):
  return functools.reduce(getattr, name.split("."), config)


def _need(condition: bool, message: str) -> None:
  if not condition:
    raise UserError(message)


def _check_data(config: Config) -> None:
  data = config.data
  _need(
    data.name == "json" or (data.question_field, data.answer_field) == ("question", "answer"),
    f"config.data.question_field and answer_field are of the data set 'json', not '{data.name}'",
  )
  parse_template(data.template, data.system)
  workers = data.grader_workers
  _need(workers >= 0, f"config.data.grader_workers is {workers}, it must be 0 (one a core) or more")


def _check_model(config: Config) -> None:
  model = config.model
  _need(
    model.heads % model.kv_heads == 0,
    f"config.model: heads {model.heads} must be a multiple of kv_heads {model.kv_heads}",
  )
  _need(model.head_dim % 2 == 0, f"config.model.head_dim {model.head_dim} must be even (RoPE)")


def _check_optimizers(config: Config) -> None:
  for name in ("optimizer", "warm_start_optimizer"):
    steps = _field(config, name)
    _need(
      steps.decay_steps == 0 or steps.decay_steps > steps.warmup_steps,
      f"config.{name}.decay_steps {steps.decay_steps} must be 0 or more than warmup_steps "
      f"{steps.warmup_steps}",
    )


def _check_rollout(config: Config) -> None:
  rollout = config.rollout
  _need(rollout.temperature > 0, "config.rollout.temperature must be above 0: rollouts explore")
  _need(0 < rollout.top_p <= 1, f"config.rollout.top_p is {rollout.top_p}, it must be in (0, 1]")
  _need(rollout.top_k >= 0, f"config.rollout.top_k is {rollout.top_k}, it must be 0 (all) or more")
  _need(
    len(config.branches) == len(config.budgets) and min((*config.branches, *config.budgets)) > 0,
    f"config.rollout: branches {config.branches} need segment_tokens for all levels but the last, "
    f"which takes what max_response_tokens {rollout.max_response_tokens} leaves; "
    f"budgets are {config.budgets}",
  )


def _check_packing(config: Config) -> None:
  packing = config.packing
  for name, divisor in (("row_length", "query_block"), ("query_block", "key_block")):
    a, b = _field(packing, name), _field(packing, divisor)
    _need(a % b == 0, f"config.packing.{name} {a} must be a multiple of {divisor} {b}")
  path = sum(config.longest_segments)
  _need(
    packing.row_length >= path,
    f"config.packing.row_length {packing.row_length} must hold the longest prompt and response, "
    f"{path} tokens",
  )


def check_mesh(config: Config, row_shards: int) -> None:
  """Checks that every batch can be split over the mesh.

  Raises:
    UserError: naming the batch that cannot, and both numbers.
  """
  for name in _SPLIT_BATCHES:
    size = _field(config, name)
    _need(
      size % row_shards == 0,
      f"config.{name} {size} cannot be divided over the mesh, whose data x fsdp axes are "
      f"{row_shards}: use a multiple of {row_shards}",
    )
