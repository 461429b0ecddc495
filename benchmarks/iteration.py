"""Seconds of whole iterations: of GRPO, ours beside google-tunix's, and the parts of SPO-tree's.

  python -m benchmarks.iteration
  python -m benchmarks.iteration --peers --spo-tree 0

First a toy task from the same weights: an iteration samples 4 prompts 4 times, 64 + 64 tokens,
counts even token numbers for a reward and takes one update, without a reference policy. Each engine
runs in a process of its own, so that its start-up is its own, one after the other, and keeps no
compiled programs from earlier runs. `start` is from the model in memory to the end of the first
iteration, `all` to the end of the last, `process` has Python's imports too.

Then `configs/spo_tree.py` in a folder that goes again, its warm start cut short: where the time of
an iteration goes. Iterations that compile or evaluate are left out. Prints tables and a line of
JSON.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import peers
from benchmarks.iteration_engines import Job
from benchmarks.run_processes import flags
from benchmarks.timing import (
  add_model_arguments,
  command_parser,
  machine,
  machine_rates,
  print_columns,
  run,
)
from spo_jax.errors import UserError
from spo_jax.infra.metrics import read_metrics

REPOSITORY = pathlib.Path(__file__).parents[1]
PAUSE_S = 0.5  # before a process
PARTS = {"sampling": "rollout", "grading": "grade", "packing": "pack", "update": "update"}
PROGRAMS = "time/programs"  # that an iteration compiled


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = command_parser("iteration", __doc__)
  add_model_arguments(parser)
  add = functools.partial(parser.add_argument, type=int)
  add("--prompts", default=4, help="of an iteration")
  add("--samples", default=4, help="responses of a prompt")
  add("--prompt", default=64, help="tokens of a prompt")
  add("--new", default=64, help="tokens of a response")
  add("--repeats", default=9, help="iterations after the first")
  add("--peers", type=str, nargs="*", choices=["tunix"], default=["tunix"])
  add("--spo-tree", default=14, help="iterations of configs/spo_tree.py; 0: none")
  add("--warm-steps", default=100, help="of its warm start")
  args = parser.parse_args(argv)
  if args.repeats < 1 or args.samples < 2:
    parser.error("--repeats must be 1 or more, and --samples 2 or more")
  if args.spo_tree and args.spo_tree < 4:
    parser.error("--spo-tree: the first iterations compile and the last evaluates, 4 are the least")
  return args


def run_process(words: Sequence[str]) -> str:
  """What a module of the repository prints; its errors go to stderr.

  Raises:
    UserError: if it fails.
  """
  kept = {name: x for name, x in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
  time.sleep(PAUSE_S)
  done = subprocess.run(
    [sys.executable, "-m", *words], cwd=REPOSITORY, env=kept, stdout=subprocess.PIPE, text=True
  )
  if done.returncode:
    raise UserError(f"{words[0]} {words[1]} failed with status {done.returncode}")
  return done.stdout


def timeline(name: str, folder: pathlib.Path, job: Job) -> dict[str, Any]:
  """The iterations of an engine, in a process of its own; see `iteration_engines.Timeline`."""
  began = time.perf_counter()
  words = ("benchmarks.iteration_engines", name, str(folder), json.dumps(dataclasses.asdict(job)))
  told = json.loads(run_process(words).splitlines()[-1])
  return told | {"process_s": time.perf_counter() - began}


def figures(told: dict[str, Any]) -> dict[str, Any]:
  """Seconds of an iteration, of the start and in all."""
  ends = told["ends"]
  return told | {
    "seconds": [end - before for before, end in zip(ends, ends[1:], strict=False)],
    "start_s": ends[0],
    "all_s": ends[-1],
  }


def print_engines(args: argparse.Namespace, engines: dict[str, Any]) -> None:
  """The engines, to be read."""
  print(
    f"{args.layers} layers of {args.width}, vocabulary {args.vocab}; a GRPO iteration of "
    f"{args.prompts} prompts x {args.samples} samples, {args.prompt} + {args.new} tokens; "
    f"{args.repeats} after the first"
  )
  spread = lambda times: (min(times), statistics.median(times), max(times))
  times = {
    name: (*spread(one["seconds"]), one["start_s"], one["all_s"], one["process_s"])
    for name, one in engines.items()
  }
  rows = {name: [f"{x:.2f}" for x in row] for name, row in times.items()}
  for name in times.keys() - {"ours"}:
    ratios = [a / b for a, b in zip(times[name], times["ours"], strict=True)]
    rows[f"{name} / ours"] = [f"{x:.2f}" for x in ratios]
  print_columns(("min s", "median s", "max s", "start s", "all s", "process s"), rows)
  for name, one in engines.items():
    if one["parts"]:
      parts = {part: statistics.median(seconds[1:]) for part, seconds in one["parts"].items()}
      print(f"{name}: " + ", ".join(f"{part} {x:.3f} s" for part, x in parts.items()))


def spo_tree_metrics(iterations: int, warm_steps: int) -> list[dict[str, Any]]:
  """Metrics of a run of the default config that evaluates and saves at its end alone."""
  fields = {
    "iterations": iterations,
    "warm_start.max_steps": warm_steps,
    "warm_start.eval_every": warm_steps,
    "eval.every": iterations + 1,
    "checkpoint.every": iterations + 1,
  }
  with tempfile.TemporaryDirectory(prefix="spo_jax_benchmark_") as folder:
    command = ["spo_jax.main", "--config=configs/spo_tree.py", f"--workdir={folder}/run"]
    run_process([*command, *flags(fields)])
    return read_metrics(pathlib.Path(folder) / "run")


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Where the time of iterations goes that neither compile nor evaluate.

  Returns:
    `iterations` that count; `seconds` by part, their means, `else` being what no part tells of.

  Raises:
    UserError: if there is no such iteration.
  """
  used = [
    (row, row["time/elapsed_s"] - before["time/elapsed_s"])
    for before, row in zip(rows, rows[1:], strict=False)
    if not row[PROGRAMS] and "eval/accuracy" not in row
  ]
  if not used:
    raise UserError("no iteration without compilation or evaluation: use a larger --spo-tree")
  mean = lambda of: statistics.fmean(of(row) for row, _ in used)
  seconds = {part: mean(lambda row: row[f"time/{key}_s"]) for part, key in PARTS.items()}  # noqa: B023
  seconds["else"] = statistics.fmean(whole for _, whole in used) - sum(seconds.values())
  return {
    "iterations": len(used),
    "seconds": seconds,
    "response_tokens": mean(lambda row: row["train/response_tokens"]),
  }


def print_shares(found: dict[str, Any]) -> None:
  """The shares, to be read."""
  whole = sum(found["seconds"].values())
  print(
    f"configs/spo_tree.py: means of {found['iterations']} iterations of {whole:.3f} s, responses "
    f"of {found['response_tokens']:.0f} tokens"
  )
  rows = {
    part: (f"{seconds:.3f}", f"{seconds / whole:.0%}") for part, seconds in found["seconds"].items()
  }
  print_columns(("seconds", "share"), rows)


def measure(args: argparse.Namespace) -> None:
  """Measures and prints.

  Raises:
    UserError: if there can be no such model, or a process fails.
  """
  job = Job(1 + args.repeats, args.prompts, args.samples, args.prompt, args.new, args.vocab)
  model = peers.random_model(args.layers, args.width, args.vocab)
  record = {
    "benchmark": "iteration",
    "machine": machine(),
    "jax": jax.__version__,
    **vars(args),
    **machine_rates(),
  }
  names = ["ours", *peers.installed(args.peers)]
  with peers.checkpoint(model) as folder:
    record["engines"] = {name: figures(timeline(name, folder, job)) for name in names}
  print(
    f"{record['machine']}, {record['matmul_gflops']:.0f} GFLOP/s, {record['copy_gb_s']:.0f} GB/s"
  )
  print_engines(args, record["engines"])
  if args.spo_tree:
    record["shares"] = shares(spo_tree_metrics(args.spo_tree, args.warm_steps))
    print_shares(record["shares"])
  print(json.dumps(record))


def main(argv: Sequence[str] | None = None) -> int:
  """Measures and prints; returns the exit status."""
  return run("iteration", measure, parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
