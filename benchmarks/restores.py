"""A checkpoint of one mesh goes on on others, and is exported: `python -m benchmarks.restores`.

  python -m benchmarks.restores --folder=runs/restores

Two iterations with a tiny model on data 2 x fsdp 2 x tensor 2, then two more from copies of that
checkpoint: where it was, on eight devices of data, and on one device; each is exported. Sampled
tokens, rewards and counts must be those of the run that stayed, losses, gradients and exported
parameters as near as --most. A copy that is exported already is not made again.
"""

import argparse
import math
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from benchmarks import meshes
from benchmarks.run_processes import flags, start, wait_all
from benchmarks.timing import command_parser, run
from spo_jax.errors import UserError

SAVED = (2, 2, 1, 2)
ONTO = (SAVED, (8, 1, 1, 1), (1, 1, 1, 1))
BEFORE, AFTER = 2, 4  # iterations when the checkpoint is made, and in all
MODEL = pathlib.Path("model", "model.safetensors")
PARAMETERS = "parameters"


class Restored(NamedTuple):
  """A run that went on."""

  found: meshes.Found
  parameters: dict[str, np.ndarray]  # exported


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = command_parser("restores", __doc__)
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--method", choices=meshes.METHODS, default="spo_tree")
  parser.add_argument("--most", type=float, default=1e-5, help="difference allowed")
  return parser.parse_args(argv)


def go_on(workdir: pathlib.Path, method: str, mesh: Sequence[int], iterations: int) -> None:
  """Starts the run of a folder, on as many devices as the mesh has, and exports it.

  Raises:
    UserError: if it fails.
  """
  # A schedule as long as the run would be another one when more iterations are asked for.
  length = {"iterations": iterations, "optimizer.decay_steps": 0}
  fields = meshes.fields(method, mesh) | length
  devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(math.prod(mesh))}
  words = [*flags(fields), f"--export={workdir}/model"]
  started = start(f"configs/{method}.py", words, workdir, variables=devices)
  statuses, _ = wait_all(started, float("inf"))
  if any(statuses):
    raise UserError(f"{workdir.name} ended with {statuses}: see {workdir}.log.0")


def restore(base: pathlib.Path, method: str, mesh: Sequence[int]) -> Restored:
  """Goes on from a copy of a run, or finds it done.

  Raises:
    UserError: if it fails, or does not go on from the checkpoint.
  """
  workdir = base.with_name(f"{method}_onto_{meshes.words(mesh)}")
  if not (workdir / MODEL).exists():
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(base, workdir)
    shutil.rmtree(workdir / MODEL.parent)
    go_on(workdir, method, mesh, AFTER)
  log = pathlib.Path(f"{workdir}.log.0").read_text()
  if f"resumed after iteration {BEFORE}" not in log:
    raise UserError(f"{workdir.name} did not go on after iteration {BEFORE}")
  return Restored(meshes.read(workdir), load_file(workdir / MODEL))


def differences(one: Restored, other: Restored) -> dict[str, float]:
  """The largest difference of each metric that is a sum, and of the parameters.

  Raises:
    UserError: if the runs differ in anything else.
  """
  if one.parameters.keys() != other.parameters.keys():
    raise UserError("other parameters are exported")
  gaps = [np.abs(a - other.parameters[name]).max() for name, a in one.parameters.items()]
  return meshes.differences(one.found, other.found) | {PARAMETERS: float(max(gaps))}


def measure(args: argparse.Namespace) -> None:
  """Makes the runs, compares and prints.

  Raises:
    UserError: if a run fails, or differs from the one that stayed where it was.
  """
  folder = args.folder.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  base = folder / f"{args.method}_{meshes.words(SAVED)}"
  if not (base / MODEL).exists():
    go_on(base, args.method, SAVED, BEFORE)
  stayed, *others = (restore(base, args.method, mesh) for mesh in ONTO)
  rows = {}
  for mesh, other in zip(ONTO[1:], others, strict=True):
    try:
      rows[meshes.words(mesh)] = differences(stayed, other)
    except UserError as error:
      raise UserError(f"onto {meshes.words(mesh)}: {error}") from error
  print(f"from {meshes.words(SAVED)} ({' x '.join(meshes.AXES)}) onto, largest differences:")
  meshes.tell_differences("restores", rows, args.most)


def main(argv: Sequence[str] | None = None) -> int:
  """Compares; returns the exit status."""
  return run("restores", measure, parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
