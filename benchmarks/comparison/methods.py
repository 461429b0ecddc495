"""What is compared: methods, and their configs on a task."""

import ast
import dataclasses
import pathlib
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

from spo_jax.config import Config
from spo_jax.config_check import check_field, from_config_dict
from spo_jax.errors import UserError

Fields = Mapping[str, Any]  # values by dotted name, as in `optimizer.learning_rate`


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the table: a config file, and the fields in which the method differs from it."""

  name: str
  config: str
  overrides: Fields = dataclasses.field(default_factory=dict)
  of_task: Mapping[str, Fields] = dataclasses.field(default_factory=dict)  # more, by task

  def fields(self, task: str) -> Fields:
    """The fields in which the method differs from its config on a task."""
    return {**self.overrides, **self.of_task.get(task, {})}


# The first one makes the warm starts, which all methods share.
METHODS = (
  Method("spo_tree", "configs/spo_tree.py"),
  Method("spo_chain", "configs/spo_chain.py"),
  Method("grpo", "configs/grpo.py"),
  Method("rloo", "configs/rloo.py"),
  Method("dr_grpo", "configs/dr_grpo.py"),
  Method("ppo", "configs/ppo.py"),
  Method("vineppo", "configs/vineppo.py"),
  # Controls. Masked tokens and saved compute are not credit assignment: GRPO has them too here, or
  # is made to train the rows without a signal that it skips of itself, and SPO is denied the mask.
  Method(
    "grpo_mask",
    "configs/grpo.py",
    {"loss.use_probability_mask": True, "packing.loss_length": 128},
  ),
  Method("grpo_all_rows", "configs/grpo.py", {"advantage.train_zero": True}),
  Method("spo_tree_no_mask", "configs/spo_tree.py", {"loss.use_probability_mask": False}),
  # Small groups with SPO-tree's baseline and mask: what is left when the segments are taken away.
  Method(
    "group_shrinkage",
    "configs/spo_tree.py",
    {"rollout.branches": (2,), "rollout.segment_tokens": (), "rollout.prompts": 208},
  ),
  # SPO-tree as in the paper: siblings are one another's baseline.
  Method(
    "spo_tree_paper",
    "configs/spo_tree.py",
    {
      "advantage.kind": "difference",
      "rollout.branches": (2, 2, 2),
      "rollout.prompts": 96,
    },
    {
      "arithmetic": {"rollout.segment_tokens": (13, 13)},
      "filler": {"rollout.segment_tokens": (16, 16)},
      "long": {"rollout.segment_tokens": (30, 30)},
      "countdown": {"rollout.segment_tokens": (8, 14)},
    },
  ),
  # SPO-chain as in the paper: probes estimate values and are thrown away.
  Method(
    "spo_chain_paper",
    "configs/spo_chain.py",
    {
      "rollout.prompts": 48,
      "rollout.probes": 4,
      "rollout.probe_where": "all",
      "rollout.slots": 96,
      "advantage.kind": "difference",
      "advantage.train_probes": False,
      "advantage.pool_trajectory": False,
      "loss.segment_weights": "equal",
    },
  ),
)
TASKS = ("arithmetic", "filler", "long", "countdown")  # variants that every method's config has

# What methods must have in common, or they would not learn the same task from the same policy.
COMMON = (
  "model",
  "data",
  "new_model",
  "compute",
  "warm_start",
  "warm_start_optimizer",
  "rollout.max_prompt_tokens",
  "rollout.max_response_tokens",
  "rollout.temperature",
  "eval.prompts",
  "eval.batch",
)


def find_methods(names: Sequence[str]) -> list[Method]:
  """Methods by name; a config file of one's own, `configs/mine.py`, is one too.

  Raises:
    UserError: if there is none of that name.
  """
  known = {method.name: method for method in METHODS}
  for name in names:
    if name.endswith(".py"):
      known[name] = Method(pathlib.Path(name).stem, name)
    elif name not in known:
      raise UserError(f"unknown method {name!r}, one of: {', '.join(known)}, or a config file")
  return [known[name] for name in names]


def parse_fields(words: Sequence[str]) -> dict[str, Any]:
  """Values of fields from words such as `rollout.prompts=8`.

  Raises:
    UserError: for a word without =, and a field that a config does not have.
  """
  fields = {}
  for word in words:
    name, equals, text = word.partition("=")
    if not equals:
      raise UserError(f"{word!r} sets no field: give FIELD=VALUE, as in rollout.prompts=8")
    check_field(Config, name)
    try:
      fields[name] = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a text
      fields[name] = text
  return fields


def load_config(method: Method, task: str, fields: Fields) -> Config:
  """The config of a method on a task, with `fields` set.

  Raises:
    UserError: if the file, the task or a field is unknown, or a value cannot work.
  """
  if not pathlib.Path(method.config).exists():
    raise UserError(f"method {method.name}: there is no config file {method.config!r}")
  config = runpy.run_path(method.config)["get_config"](task)
  try:
    for name, value in {**method.fields(task), **fields}.items():
      check_field(Config, name)
      config.update_from_flattened_dict({name: value})
    return from_config_dict(config, Config)
  except (UserError, TypeError) as error:
    raise UserError(f"method {method.name}, task {task}: {error}") from error


def check_common(methods: Sequence[Method], task: str, fields: Fields) -> None:
  """Checks that methods learn the same task from the same policy, that of the first of `METHODS`.

  Raises:
    UserError: naming what differs.
  """
  ours = dataclasses.asdict(load_config(METHODS[0], task, fields))
  for method in methods:
    theirs = dataclasses.asdict(load_config(method, task, fields))
    for path in COMMON:
      if _value(theirs, path) != _value(ours, path):
        raise UserError(
          f"task {task}: {METHODS[0].name} and {method.name} differ in config.{path} and cannot be "
          "compared; --set sets a field for all"
        )


def _value(config: dict[str, Any], path: str) -> Any:
  for name in path.split("."):
    config = config[name]
  return config
