"""The policy that a workdir holds, and the methods that might train it from there."""

import ast
import dataclasses
import json
import pathlib
import runpy
import shlex
from collections.abc import Sequence
from typing import Any

import ml_collections

from spo_jax.config import Config
from spo_jax.config_check import check_field, from_config_dict
from spo_jax.errors import UserError
from spo_jax.infra.checkpoints import Checkpoints
from spo_jax.learner import Learner
from spo_jax.run import Run
from spo_jax.training.step import init_state

CHECKPOINT, WARM_START = "checkpoint", "warm_start"

# NAME: FILE FIELD=VALUE ..., each a method and what is changed in it.
PAPER_CHAIN = (
  "configs/spo_chain.py rollout.probes=4 rollout.probe_where=all advantage.kind=difference "
  "advantage.train_probes=False advantage.pool_trajectory=False loss.segment_weights=equal"
)
PAPER_TREE = (
  "configs/spo_tree.py advantage.kind=difference rollout.branches=(2,2,2) "
  "rollout.segment_tokens=(13,13)"
)
METHODS = (
  "GRPO: configs/grpo.py",
  "RLOO: configs/rloo.py",
  "RLOO, mask: configs/rloo.py loss.use_probability_mask=True",
  "RLOO, 2 responses: configs/rloo.py rollout.samples=2",
  "RLOO, 2 responses, shrinkage: configs/rloo.py rollout.samples=2 advantage.kind=shrinkage",
  "VinePPO: configs/vineppo.py",
  # As in the paper; then with each of what the config of the embedded tasks adds to it.
  f"SPO-chain: {PAPER_CHAIN}",
  f"SPO-chain, pooled: {PAPER_CHAIN} advantage.pool_trajectory=True",
  f"SPO-chain, probes trained: {PAPER_CHAIN} advantage.train_probes=True",
  f"SPO-chain, probes trained, shares: {PAPER_CHAIN} advantage.train_probes=True "
  "loss.segment_weights=share",
  "SPO-chain, all of it and shrinkage: configs/spo_chain.py",
  f"SPO-tree 2-2-2: {PAPER_TREE}",
  f"SPO-tree 2-2-2, all tokens: {PAPER_TREE} loss.use_probability_mask=False",
  f"SPO-tree 2-2-2, shares: {PAPER_TREE} loss.segment_weights=share",
  f"SPO-tree 2-2-2, shrinkage: {PAPER_TREE} advantage.kind=shrinkage",
  f"SPO-tree 4-4-4: {PAPER_TREE} rollout.branches=(4,4,4)",
  "SPO-tree 2-2: configs/spo_tree.py advantage.kind=difference",
  "SPO-tree 2-2, shrinkage: configs/spo_tree.py",
  "SPO-tree 2-2, shrinkage, shares: configs/spo_tree.py loss.segment_weights=share",
)


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to train the policy."""

  name: str
  config: Config


def read_config(workdir: pathlib.Path) -> tuple[Config, str | None]:
  """The config of a workdir's run, and the variant of its config file.

  Raises:
    UserError: if the workdir holds no run, or one of a version with other fields.
  """
  path = workdir / "config.json"
  try:
    fields = json.loads(path.read_text())
  except (OSError, json.JSONDecodeError) as error:
    raise UserError(f"--workdir: {path} cannot be read: {error}") from error
  variant = fields.pop("config_file", "").partition(":")[2] or None
  return from_config_dict(ml_collections.ConfigDict(fields), Config), variant


def load_policy(run: Run, which: str) -> tuple[Any, Any]:
  """Parameters of the policy and, where the run has a critic, of the critic.

  Args:
    run: of a workdir in which no run is going on.
    which: `CHECKPOINT`, the newest, or `WARM_START`.

  Returns:
    (policy, critic or None).

  Raises:
    UserError: if the workdir has no such checkpoint.
  """
  folder = run.workdir / {CHECKPOINT: "checkpoints", WARM_START: "warm_start"}[which]
  checkpoints = Checkpoints(folder, keep=run.config.checkpoint.keep) if folder.exists() else None
  if checkpoints is None or (step := checkpoints.latest()) is None:
    raise UserError(f"{folder} holds no checkpoint: choose another --policy")
  if which == WARM_START:
    like = init_state(run.initial_params(), run.config.warm_start_optimizer)
  else:
    like = Learner(run, run.initial_params()).arrays()
  arrays, _ = checkpoints.restore(step, like)
  checkpoints.close()
  if which == WARM_START or run.config.critic.trunk == "none":
    return arrays.params, None
  if run.config.critic.trunk == "shared":
    return arrays.params, arrays.params
  policy, critic = arrays
  return policy.params, critic.params


def parse_methods(texts: Sequence[str], base: Config, variant: str | None) -> list[Method]:
  """Methods from `NAME: FILE FIELD=VALUE ...`, on the task and the model of a run.

  Args:
    texts: a method each; FILE may be FILE:variant.
    base: the run's config, whose data, model and lengths hold for all.
    variant: of a FILE without one.

  Raises:
    UserError: for a text of another form, a file or a field that is not there, a method without
      advantages.
  """
  methods = [_parse_method(text, base, variant) for text in texts]
  names = [method.name for method in methods]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f"--method: {name!r} is given twice")
  return methods


def _parse_method(text: str, base: Config, variant: str | None) -> Method:
  name, colon, rest = text.partition(":")
  words = shlex.split(rest)
  if not colon or not words or not all("=" in word for word in words[1:]):
    raise UserError(f"--method: {text!r} is not of the form 'NAME: FILE FIELD=VALUE ...'")
  file, _, own_variant = words[0].partition(":")
  if not pathlib.Path(file).is_file():
    raise UserError(f"--method {name!r}: there is no file {file}")
  config = runpy.run_path(file)["get_config"](own_variant or variant)
  for word in words[1:]:
    field, _, value = word.partition("=")
    config.update_from_flattened_dict({field: _value(field, value)})
  return Method(name.strip(), on_task(from_config_dict(config, Config), base, name.strip()))


def _value(field: str, text: str) -> Any:
  if check_field(Config, field) is str:
    return text
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError) as error:
    raise UserError(f"--method: {field}={text} is no value") from error


def on_task(config: Config, base: Config, name: str) -> Config:
  """A method's config with the run's data, model and lengths, in full precision and without KL.

  Raises:
    UserError: if its loss has no advantages.
  """
  if config.loss.kind != "ppo_clip":
    raise UserError(f"method {name!r}: loss.kind {config.loss.kind!r} has no advantages to judge")
  shared = ("data", "new_model", "model", "compute", "mesh", "packing")
  lengths = ("max_prompt_tokens", "max_response_tokens", "temperature", "top_k", "top_p")
  rollout = {field: getattr(base.rollout, field) for field in lengths}
  return dataclasses.replace(
    config,
    **{field: getattr(base, field) for field in shared},
    rollout=dataclasses.replace(config.rollout, **rollout, weights="full", cache="full"),
    loss=dataclasses.replace(
      config.loss,
      kl_coef=0.0,
      kl_in="loss",
      forward_kl_coef=0.0,
      kl_control="fixed",
      importance_cap=0.0,
    ),
  )
