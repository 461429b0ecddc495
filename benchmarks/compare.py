"""Methods, seeds and tasks under equal budgets: runs them, prints tables, draws curves.

  python -m benchmarks.compare --folder=runs/compare --tasks arithmetic --arms tokens --tokens=5e6
  python -m benchmarks.compare --folder=runs/compare --arms seconds --seconds=150 \\
      --only warm_start calibration
  python -m benchmarks.compare --folder=runs/sweep --methods grpo --arms own --only warm_start sweep

First come warm starts, one a task and seed, shared by all methods; then a short run of each method
that tells what an iteration takes (alone: let nothing else run on the machine if seconds are to be
equal); then a sweep of the learning rate on the validation split; then the runs that count. Below
the folder `TASK/ARM` has table.md, results.json and curves.png. The same command goes on with what
is left. Exit status 0: all is done; 1: a run failed; 2: a mistake of yours; 3: the deadline came.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.comparison.budgets import ARMS, Budgets, read_calibration
from benchmarks.comparison.methods import METHODS, TASKS, check_common, find_methods, parse_fields
from benchmarks.comparison.plan import Plan
from benchmarks.comparison.plots import draw
from benchmarks.comparison.rates import read_rates
from benchmarks.comparison.runs import Maker
from benchmarks.comparison.stages import CALIBRATION_FILE, STAGES, Comparison
from benchmarks.comparison.tables import page
from spo_jax.command_line import USER_ERROR_STATUS
from spo_jax.errors import UserError

FAILED_STATUS, LEFT_STATUS = 1, 3


def parse_args(argv: list[str]) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.compare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  names = [method.name for method in METHODS]
  add("--folder", type=pathlib.Path, required=True, help="where everything lies")
  add("--methods", nargs="+", default=names, help=f"of {', '.join(names)}, or config files")
  add("--tasks", nargs="+", default=TASKS, help="variants of their configs")
  add("--arms", nargs="+", default=("tokens",), choices=ARMS, help="what is held equal")
  add("--prompts", type=int, help="of an update, arm prompts")
  add("--updates", type=int, help="of a run, arm prompts")
  add("--tokens", type=float, help="that a run samples, arm tokens")
  add("--seconds", type=float, help="that a run trains, arm seconds")
  add("--seeds", type=int, nargs="+", default=(0, 1, 2, 3, 4), help="of the runs that count")
  add("--split", default="test", help="that these are evaluated on")
  add("--evaluations", type=int, default=8, help="of a run, the first not counted")
  add("--rates", type=float, nargs="*", default=(2e-4, 4e-4, 8e-4, 1.6e-3), help="none: own rates")
  add("--sweep_seeds", type=int, nargs="+", default=(100,), help="of the runs that choose rates")
  add("--extensions", type=int, default=2, help="most rates beyond the grid, if the best is last")
  add("--sweep_arm", default="", choices=("", *ARMS), help="whose rates serve all arms")
  add("--rates_from", type=pathlib.Path, help="rates.json of another folder, instead of a sweep")
  add("--calibration", type=pathlib.Path, help="calibration.json of another folder or machine")
  add("--calibration_iterations", type=int, default=24)
  add("--set", nargs="+", default=(), metavar="FIELD=VALUE", help="fields of all runs")
  add("--env", nargs="+", default=(), metavar="KEY=VALUE", help="environment of all runs")
  add("--jobs", type=int, default=1, help="runs at a time, each on cores of its own")
  add("--deadline_s", type=float, default=math.inf, help="then running ones are stopped")
  add("--only", nargs="+", default=STAGES, choices=STAGES, help="stages")
  return parser.parse_args(argv)


def make_plan(args: argparse.Namespace) -> Plan:
  """The plan, checked as far as it can be before anything runs.

  Raises:
    UserError: if a method, a task, a field or a budget is missing or cannot be compared.
  """
  plan = Plan(
    folder=args.folder,
    methods=find_methods(args.methods),
    tasks=args.tasks,
    arms=args.arms,
    seeds=args.seeds,
    sweep_seeds=args.sweep_seeds,
    rates=args.rates,
    extensions=args.extensions,
    sweep_arm=args.sweep_arm,
    split=args.split,
    evaluations=args.evaluations,
    fields=parse_fields(args.set),
    budgets=Budgets(args.prompts, args.updates, args.tokens, args.seconds),
    calibration_iterations=args.calibration_iterations,
  )
  for arm in {*plan.arms, *filter(None, [plan.sweep_arm])}:
    plan.budgets.told(arm)
  for task in plan.tasks:
    check_common(plan.methods, task, plan.fields)
  return plan


def parse_environment(words: list[str]) -> dict[str, str]:
  """This process's environment with variables set.

  Raises:
    UserError: for a word without =.
  """
  if wrong := [word for word in words if "=" not in word]:
    raise UserError(f"--env {wrong[0]!r} sets no variable: give KEY=VALUE")
  return os.environ | dict(word.split("=", 1) for word in words)


def write(folder: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Writes and prints an arm of a task."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
  text = page(result)
  (folder / "table.md").write_text(text)
  print(text)
  if result["methods"]:
    print(draw(result, folder / "curves.png"))


def compare(args: argparse.Namespace, command: str) -> int:
  """Does what is left; returns the exit status.

  Args:
    args: the command line, parsed.
    command: the command line, to be written beside the tables.

  Raises:
    UserError: for a mistake on the command line.
  """
  began = time.monotonic()
  plan = make_plan(args)
  maker = Maker(
    jobs=args.jobs,
    environment=parse_environment(args.env),
    deadline=began + args.deadline_s,
    say=lambda line: print(line, flush=True),
  )
  paces = read_calibration(args.calibration or plan.folder / CALIBRATION_FILE)
  rates = read_rates(args.rates_from) if args.rates_from else {}
  plan.folder.mkdir(parents=True, exist_ok=True)
  comparison = Comparison(plan, maker, paces, rates)
  steps = {
    "warm_start": comparison.warm_start,
    "calibration": comparison.calibrate,
    "sweep": comparison.sweep,
    "test": comparison.test,
  }
  for stage in (stage for stage in steps if stage in args.only):
    steps[stage]()
  if "tables" in args.only:
    made = {"command": command, "date": datetime.date.today().isoformat()}
    for task, arm in itertools.product(plan.tasks, plan.arms):
      write(plan.folder / task / arm, made | comparison.results(task, arm))
  return status(comparison)


def status(comparison: Comparison) -> int:
  """Tells what failed and what is left."""
  maker = comparison.maker
  for run in maker.failed.values():
    print(f"failed: {run.workdir}, see {run.log}", file=sys.stderr)
  if left := maker.left:
    print(f"{len(left)} runs are left: the same command goes on with them", file=sys.stderr)
  if unknown := comparison.uncalibrated():
    names = ", ".join(dict.fromkeys(f"{cell.method.name} on {cell.task}" for cell in unknown))
    print(f"not calibrated and left out: {names}", file=sys.stderr)
  return FAILED_STATUS if maker.failed else LEFT_STATUS if left or unknown else 0


def main(argv: list[str]) -> int:
  """Entry point."""
  # So that the runs are told to end too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  try:
    return compare(parse_args(argv), shlex.join(["python", "-m", "benchmarks.compare", *argv]))
  except UserError as error:
    print(f"compare: {error}", file=sys.stderr)
    return USER_ERROR_STATUS


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
