"""Entry point: `python -m spo_jax.main --config=configs/spo_tree.py --workdir=runs/tree`."""

import dataclasses
import json
import pathlib
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from spo_jax.errors import UserError

USER_ERROR_STATUS = 2
# Fields that may change when a workdir is used again: none of them changes an iteration's result.
MAY_CHANGE = ("iterations", "checkpoint")

_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE[:variant]", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumed if it holds one.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
  """Checks the config and trains."""
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}: fields are set as --config.field=value")
  logging.set_verbosity(logging.WARNING)
  from spo_jax import config as configs

  config = configs.from_config_dict(_CONFIG.value)
  workdir = pathlib.Path(_WORKDIR.value)
  claim_workdir(workdir, dataclasses.asdict(config))
  # Imported after the checks that need no JAX: a misspelt field is reported at once.
  from spo_jax import run, train
  from spo_jax.infra.progress import Progress

  with Progress(config.iterations) as progress:
    train.train(run.make_run(config, workdir, progress))


def claim_workdir(workdir: pathlib.Path, config: dict[str, Any]) -> None:
  """Writes `config.json`, or checks that the workdir's own is the same.

  Raises:
    UserError: if the workdir belongs to a run with another config, or is no folder that can be written.
  """
  path = workdir / "config.json"
  config = json.loads(json.dumps(config))
  if path.exists():
    try:
      old = json.loads(path.read_text())
    except ValueError as error:
      raise UserError(f"{path} is no JSON file: {error}") from error
    for name in difference(old, config):
      if name.split(".")[0] not in MAY_CHANGE:
        raise UserError(
          f"workdir {workdir} holds a run with another config ({name} differs): use another --workdir"
        )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n")
  except OSError as error:
    raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from error


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


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags; a mistake in them is the user's, reported in one line."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    raise UserError(" ".join(str(error).split())) from error


def run_main() -> None:
  """Runs `main`: exit status 0 means trained, 2 a mistake that one line explains."""
  try:
    main(parse_flags(sys.argv))
  except UserError as error:
    print(f"spo_jax: {error}", file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)


if __name__ == "__main__":
  run_main()
