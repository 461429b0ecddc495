"""Entry point: `python -m spo_jax.main --config=configs/spo_tree.py --workdir=runs/spo_tree`.

Exit status 0 means trained; 2 is a mistake of the user's, told in one line. The same command with
the same workdir resumes.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from spo_jax.config_check import check_field, from_config_dict
from spo_jax.errors import UserError

USER_ERROR_STATUS = 2
# Fields that may change when a workdir is used again: none of them changes the result of an
# iteration.
MAY_CHANGE = ("iterations", "checkpoint")

_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE or FILE:variant", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; a run that it holds is resumed")
flags.mark_flags_as_required(["config", "workdir"])


def run_main(argv: list[str]) -> int:
  """Trains as the command line says; returns the exit status."""
  try:
    parse_flags(argv)
    train_from_flags()
  except UserError as error:
    print(f"spo_jax: {error}", file=sys.stderr)
    return USER_ERROR_STATUS
  return 0


def parse_flags(argv: list[str]) -> None:
  """Parses the command line, overrides of config fields included.

  Raises:
    UserError: for an unknown flag or field, a value of another type, a config file that cannot be
      read.
  """
  for argument in argv[1:]:
    name = argument.lstrip("-").partition("=")[0]
    if argument.startswith("-") and name.startswith("config."):
      check_field(name.removeprefix("config."))
  file = config_name(argv).partition(":")[0]
  if file and not os.path.exists(file):
    raise UserError(f"there is no config file {file!r}")
  try:
    rest = flags.FLAGS(argv)
  # The library raises TypeError and ValueError for a value of another type than the field's.
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(" ".join(str(error).split())) from error
  if len(rest) > 1:
    raise UserError(f"unexpected argument {rest[1]!r}: fields are set as --config.field=value")


def train_from_flags() -> None:
  """Checks the config, claims the workdir, trains."""
  logging.set_verbosity(logging.WARNING)
  config = from_config_dict(_CONFIG.value)
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  claim_workdir(workdir, dataclasses.asdict(config) | {"config_file": config_name(sys.argv)})
  # Imported after the checks that need no JAX: a misspelt field is reported at once.
  from spo_jax.infra.progress import Progress
  from spo_jax.run import make_run
  from spo_jax.train import train

  with (
    Progress(config.iterations) as progress,
    contextlib.closing(make_run(config, workdir, progress)) as run,
  ):
    train(run)


def config_name(argv: list[str]) -> str:
  """FILE:variant as it stands on the command line."""
  for argument, following in zip(argv, [*argv[1:], ""], strict=True):
    name, _, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name == "config":
      return value or following
  return ""


def claim_workdir(workdir: pathlib.Path, config: dict[str, Any]) -> None:
  """Writes `config.json`, or checks that the workdir's own is the same.

  Raises:
    UserError: if the workdir belongs to a run with another config, or cannot be written.
  """
  path = workdir / "config.json"
  config = json.loads(json.dumps(config))
  try:
    if path.exists():
      for name in difference(json.loads(path.read_text()), config):
        if name.split(".")[0] not in (*MAY_CHANGE, "config_file"):
          raise UserError(
            f"workdir {workdir} holds a run with another config ({name} differs): "
            "choose another --workdir"
          )
    workdir.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(unfinished, path)
  except OSError as error:
    raise UserError(f"workdir {workdir} cannot be used: {error.strerror}") from error
  except json.JSONDecodeError as error:
    raise UserError(f"{path} is no JSON file ({error}): choose another --workdir") from error


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
  """Dotted names of the fields in which two nested configs differ."""
  names = []
  for name in [*new, *(n for n in old if n not in new)]:
    a, b = old.get(name), new.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      names += difference(a, b, f"{prefix}{name}.")
    elif a != b:
      names.append(prefix + name)
  return names


if __name__ == "__main__":
  sys.exit(run_main(sys.argv))
