"""A run that is killed again and again ends as the one that was not: `python -m benchmarks.soak`.

  python -m benchmarks.soak --kills 30 --folder=runs/soak
  python -m benchmarks.soak --kills 30 --processes 2 --folder=runs/soak2 --config.iterations=20

First the run is made without a kill, then once more in another folder, where at moments drawn at
random it gets SIGTERM or SIGKILL, and, if there are several processes, one of them alone, and is
started again by the same command. The parameters at the end and `metrics.jsonl`, seconds apart,
must be the same to the last bit. Tells how long a start took until the run went on, how much was
done again, and how processes ended whose neighbour was killed.
"""

import argparse
import json
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.run_processes import POLL_S, metrics_without_timings, start, wait_all
from benchmarks.timing import command_parser, machine, run
from spo_jax.errors import UserError
from spo_jax.infra import hosts
from spo_jax.infra.metrics import read_metrics
from spo_jax.infra.stopping import STOPPED_STATUS

KINDS = ("SIGKILL of all", "SIGTERM of all", "SIGKILL of one", "SIGTERM of one")
# A process whose neighbour is gone must have ended by then, even if it waits for it to come.
MOST_END_S = hosts.START_S + 2 * hosts.SILENCE_S


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """The command line, and the fields of the config that it sets."""
  parser = command_parser("soak", __doc__)
  parser.add_argument("--config", default="configs/spo_tree.py")
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--seed", type=int, default=0, help="of the moments and the signals")
  parser.add_argument("--longest", type=float, default=40.0, help="seconds from start to a kill")
  args, fields = parser.parse_known_args(argv)
  if wrong := [word for word in fields if not word.startswith("--config.")]:
    parser.error(f"unknown argument {wrong[0]}")
  return args, fields


def start_run(
  args: argparse.Namespace, fields: list[str], workdir: pathlib.Path
) -> list[subprocess.Popen]:
  """The processes of the run, which ends with an export."""
  return start(args.config, [*fields, f"--export={workdir}/model"], workdir, args.processes)


def lines(workdir: pathlib.Path) -> int:
  """Lines of metrics so far."""
  return len(read_metrics(workdir))


def kill_once(
  args: argparse.Namespace, fields: list[str], workdir: pathlib.Path, rng: random.Random
) -> dict[str, Any] | None:
  """Starts the run and ends it at some moment; None if it was done before.

  The moment is counted from the first line of metrics that the start adds, or from the start.
  """
  before = lines(workdir)
  began = time.monotonic()
  processes = start_run(args, fields, workdir)
  after_first = rng.random() < 0.7
  left_s = rng.uniform(0, args.longest)
  resumed_s = None
  while all(process.poll() is None for process in processes):
    now = lines(workdir)
    if resumed_s is None and now != before:
      resumed_s = time.monotonic() - began
      if after_first:
        left_s = time.monotonic() - began + rng.uniform(0, args.longest / 4)
    if time.monotonic() - began > left_s:
      break
    time.sleep(POLL_S)
  kind = rng.choice(KINDS if args.processes > 1 else KINDS[:2])
  number = signal.SIGKILL if "KILL" in kind else signal.SIGTERM
  alive = [process for process in processes if process.poll() is None]
  if len(alive) == len(processes):
    for process in alive if kind.endswith("all") else [rng.choice(alive)]:
      process.send_signal(number)
  else:
    kind = "none: it ended"
  statuses, end_s = wait_all(processes, MOST_END_S)
  if statuses == [0] * len(processes):
    return None
  # A process whose neighbour is gone is aborted by JAX's runtime.
  known = {0, STOPPED_STATUS, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT}
  return {
    "kind": kind,
    "statuses": statuses,
    "unforeseen": [s for s in statuses if s not in known],
    "end_s": end_s,
    "resumed_s": resumed_s,
    "lines": lines(workdir),
  }


def same(a: pathlib.Path, b: pathlib.Path) -> None:
  """Checks that two runs ended alike.

  Raises:
    UserError: naming the first difference.
  """
  of_a, of_b = map(metrics_without_timings, (a, b))
  for one, other in zip(of_a, of_b, strict=True):
    if one != other:
      raise UserError(f"iteration {one['iteration']} differs: {one} {other}")
  models = [load_file(workdir / "model" / "model.safetensors") for workdir in (a, b)]
  for name, tensor in models[0].items():
    if not np.array_equal(tensor, models[1][name]):
      raise UserError(f"the parameters {name} differ")


def measure(args: argparse.Namespace, fields: list[str]) -> None:
  """Makes both runs and prints.

  Raises:
    UserError: if the runs differ, or a process does not end.
  """
  args.folder.mkdir(parents=True, exist_ok=True)
  folder = args.folder.absolute()
  began = time.monotonic()
  statuses, _ = wait_all(start_run(args, fields, folder / "whole"), float("inf"))
  whole_s = time.monotonic() - began
  if any(statuses):
    raise UserError(f"the run without kills ended with {statuses}: see {folder}/whole.log.0")
  rng, kills = random.Random(args.seed), []
  began = time.monotonic()
  done = False
  while len(kills) < args.kills and not done:
    found = kill_once(args, fields, folder / "killed", rng)
    done = found is None
    if not done:
      kills.append(found)
      print(json.dumps(found), flush=True)
  if not done:
    statuses, _ = wait_all(start_run(args, fields, folder / "killed"), float("inf"))
    if any(statuses):
      raise UserError(f"the last start ended with {statuses}: see {folder}/killed.log.0")
  same(folder / "whole", folder / "killed")
  resumed = [kill["resumed_s"] for kill in kills if kill["resumed_s"] is not None]
  record = {
    "benchmark": "soak",
    "machine": machine(),
    **{name: str(value) for name, value in vars(args).items()},
    "kills": len(kills),
    "whole_s": whole_s,
    "killed_s": time.monotonic() - began,
    "resumed_s": [min(resumed), statistics.median(resumed), max(resumed)] if resumed else [],
    "end_s": max(kill["end_s"] for kill in kills) if kills else 0,
  }
  print(f"{len(kills)} kills; parameters and metrics are the same to the last bit")
  print(json.dumps(record))


def main(argv: Sequence[str] | None = None) -> int:
  """Measures and prints; returns the exit status."""
  args, fields = parse_args(argv)
  return run("soak", lambda args: measure(args, fields), args)


if __name__ == "__main__":
  sys.exit(main())
