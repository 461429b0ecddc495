"""From what the user wrote to a `Config`: names, types and values are checked before anything is
built or compiled.
"""

import dataclasses
import difflib
import typing
from typing import Any

import ml_collections

from spo_jax.config import Config, EvaluationConfig
from spo_jax.config_rules import check_evaluation, check_training
from spo_jax.errors import UserError

_CHECKS = {Config: check_training, EvaluationConfig: check_evaluation}
# Fields that have had values of another type, and what these are called now.
_FORMER = {"remat": "'none' is what False was, 'blocks' what True was; or use 'dots'"}

C = typing.TypeVar("C", Config, EvaluationConfig)


def from_config_dict(config: ml_collections.ConfigDict, config_class: type[C]) -> C:
  """The typed config of a command, checked.

  Args:
    config: what the user wrote.
    config_class: `Config` or `EvaluationConfig`.

  Raises:
    UserError: if a field is missing, unknown, of another type, or has a value that cannot work.
  """
  built = _build(config_class, config.to_dict(), "config")
  _CHECKS[config_class](built)
  return built


def check_field(config_class: type, path: str) -> type:
  """The type of a field of a config by its dotted name, such as `rollout.prompts`.

  Raises:
    UserError: if there is none, with the nearest name that there is.
  """
  cls, where = config_class, "config"
  for name in path.split("."):
    if not dataclasses.is_dataclass(cls):
      raise UserError(f"{where} is a {cls.__name__} and has no field {name!r}")
    _check_name(cls, name, where)
    cls, where = typing.get_type_hints(cls)[name], f"{where}.{name}"
  return cls


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
    raise UserError(with_hint(f"{where} is {value!r}, it must be of type {kind.__name__}"))
  return value


def with_hint(message: str) -> str:
  """A message about a value of a wrong type; with what it is called now, if it was right once."""
  return "; ".join([message, *(now for name, now in _FORMER.items() if name in message)])
