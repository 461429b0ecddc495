"""The same run on other meshes and by more processes: `python -m benchmarks.meshes`.

  python -m benchmarks.meshes --folder=runs/meshes
  python -m benchmarks.meshes --folder=runs/meshes --methods spo_tree --processes 1 2

Three iterations of SPO-tree and SPO-chain with a tiny model on 8 CPU devices: on several meshes,
each by one process and by several, beside one process on a mesh of data alone. Sampled tokens,
rewards and counts must be the same, losses and gradients as near as --most. A run that is there
already is not made again.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.run_processes import SIGNAL, TINY, flags, metrics_without_timings, start, wait_all
from benchmarks.timing import command_parser, machine, print_columns, run
from spo_jax import rollouts
from spo_jax.errors import UserError

DEVICES = 8
AXES = ("data", "fsdp", "sequence", "tensor")
MESHES = ((8, 1, 1, 1), (2, 2, 1, 2), (1, 4, 1, 2), (2, 2, 2, 1))
FIELDS = {
  **TINY,
  **SIGNAL,
  "iterations": 3,
  "rollout.prompts": 16,
  "packing.row_length": 320,  # that a sequence axis of 2 divides into whole blocks of queries
  "eval.every": 3,
}
METHODS = {
  "spo_tree": {},
  "spo_chain": {"rollout.max_response_tokens": 48, "rollout.probes": 2},
}
ROLLOUTS = ("first", "last")
SAMPLED = ("parent", "tokens", "reward", "finished", "probe")  # of a rollout's node
# Metrics of sums over devices, which are added up in another order; all others must be the same.
SUMS = ("train/loss", "train/grad_norm", "train/ratio", "train/policy_kl", "train/kl")


class Found(NamedTuple):
  """A run."""

  metrics: list[dict[str, Any]]
  sampled: list[list[dict[str, Any]]]  # nodes of the trees of ROLLOUTS, without what is estimated


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = command_parser("meshes", __doc__)
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
  parser.add_argument("--processes", nargs="+", type=int, choices=[1, 2, 4, 8], default=[1, 2, 4])
  parser.add_argument("--most", type=float, default=1e-5, help="difference of losses allowed")
  return parser.parse_args(argv)


def words(mesh: Sequence[int]) -> str:
  """A mesh in a name."""
  return "x".join(map(str, mesh))


def fields(method: str, mesh: Sequence[int]) -> dict[str, Any]:
  """The config's fields of a run."""
  axes = {f"mesh.{axis}": size for axis, size in zip(AXES, mesh, strict=True)}
  return FIELDS | METHODS[method] | axes


def make(folder: pathlib.Path, method: str, mesh: Sequence[int], processes: int) -> Found:
  """Makes a run, or finds it.

  Raises:
    UserError: if it fails.
  """
  workdir = folder / f"{method}_{words(mesh)}_by_{processes}"
  if not (workdir / "report.html").exists():
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // processes)}
    statuses, _ = wait_all(
      start(f"configs/{method}.py", flags(fields(method, mesh)), workdir, processes, devices),
      float("inf"),
    )
    if any(statuses):
      raise UserError(f"{workdir.name} ended with {statuses}: see {workdir}.log.0")
  return read(workdir)


def read(workdir: pathlib.Path) -> Found:
  """A run that is done."""
  trees = [json.loads((workdir / rollouts.FOLDER / f"{x}.json").read_text()) for x in ROLLOUTS]
  kept = [[{name: node[name] for name in SAMPLED} for node in tree["nodes"]] for tree in trees]
  return Found(metrics_without_timings(workdir), kept)


def differences(one: Found, other: Found) -> dict[str, float]:
  """The largest difference of each metric of SUMS that both runs have.

  Raises:
    UserError: if the runs differ in anything else.
  """
  if one.sampled != other.sampled:
    raise UserError("other tokens are sampled")
  if len(one.metrics) != len(other.metrics):
    raise UserError(f"{len(other.metrics)} iterations in place of {len(one.metrics)}")
  most = {}
  for a, b in zip(one.metrics, other.metrics, strict=True):
    if a.keys() != b.keys():
      raise UserError(f"other metrics: {', '.join(sorted(a.keys() ^ b.keys()))}")
    for name in a:
      if name in SUMS and None not in (a[name], b[name]):  # None: it was not finite
        most[name] = max(most.get(name, 0.0), abs(a[name] - b[name]))
      elif a[name] != b[name]:
        raise UserError(f"{name} of iteration {a['iteration']}: {b[name]} in place of {a[name]}")
  return most


def tell_differences(
  benchmark: str, rows: Mapping[str, Mapping[str, float]], most: float, **record: Any
) -> None:
  """Prints a table of the differences of runs, and the benchmark's record.

  Raises:
    UserError: if one is larger than most.
  """
  names = list(dict.fromkeys(name for row in rows.values() for name in row))
  print_columns(names, {run: [f"{row[x]:.1e}" for x in names] for run, row in rows.items()})
  worst = max(max(row.values()) for row in rows.values())
  print(json.dumps({"benchmark": benchmark, "machine": machine(), "most": worst} | record))
  if worst > most:
    raise UserError(f"a difference of {worst:.1e} is more than {most:.0e}")


def measure(args: argparse.Namespace) -> None:
  """Makes the runs, compares and prints.

  Raises:
    UserError: if a run fails, or differs from that of one process and data alone.
  """
  folder = args.folder.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  rows, rewards = {}, {}
  for method in args.methods:
    first = make(folder, method, MESHES[0], 1)
    rewards[method] = [row["train/reward_mean"] for row in first.metrics[1:]]
    if not 0 < min(rewards[method]) <= max(rewards[method]) < 1:
      raise UserError(f"{method} earns rewards of {rewards[method]}, which train nothing")
    for mesh in MESHES:
      for processes in args.processes:
        name = f"{method} {words(mesh)}, {processes} x {DEVICES // processes}"
        try:
          rows[name] = differences(first, make(folder, method, mesh, processes))
        except UserError as error:
          raise UserError(f"{name}: {error}") from error
        print(f"{name}: {rows[name]}", flush=True)
  print(
    f"{' x '.join(AXES)}, processes x devices; tokens, rewards and counts the same, largest "
    "differences:"
  )
  tell_differences("meshes", rows, args.most, rewards=rewards)


def main(argv: Sequence[str] | None = None) -> int:
  """Compares; returns the exit status."""
  return run("meshes", measure, parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
