"""What methods reach: runs configs over seeds and learning rates, and prints accuracies as a table.

  python -m benchmarks.learning --folder=runs/seeds configs/spo_tree.py
  python -m benchmarks.learning --folder=runs/sweep --seeds 0 --rates 2e-4 4e-4 8e-4 \\
      --split=validation configs/spo_chain.py configs/grpo.py

A run that is there already is not made again, one that was interrupted goes on.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import subprocess
import sys

from spo_jax.infra.metrics import read_metrics

ACCURACIES = ("eval/accuracy", "eval/accuracy_greedy")


def run(config: str, workdir: pathlib.Path, fields: dict[str, object]) -> None:
  """Trains, or goes on, or does nothing if all is done.

  Raises:
    CalledProcessError: if training failed.
  """
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  command = [sys.executable, "-m", "spo_jax.main", f"--config={config}", f"--workdir={workdir}"]
  if not (workdir / "report.html").exists():
    with open(workdir.with_name(workdir.name + ".log"), "a") as log:
      subprocess.run([*command, *flags], check=True, stdout=log, stderr=log)


def summary(workdir: pathlib.Path) -> dict[str, float]:
  """First and last accuracies, tokens and seconds of a finished run."""
  rows = read_metrics(workdir)
  evaluated = [row for row in rows if ACCURACIES[0] in row]
  first, last = evaluated[0], evaluated[-1]
  return {
    "sampled before": first[ACCURACIES[0]],
    "sampled after": last[ACCURACIES[0]],
    "greedy before": first[ACCURACIES[1]],
    "greedy after": last[ACCURACIES[1]],
    "iterations": last["iteration"],
    "M tokens sampled": last["tokens/sampled"] / 1e6,
    "RL seconds": last["time/elapsed_s"],
  }


def table(rows: list[tuple[str, dict[str, float]]]) -> str:
  """A Markdown table."""
  names = list(rows[0][1])
  lines = ["| run | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
  for label, row in rows:
    cells = [f"{row[name]:.3g}" for name in names]
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main() -> None:
  """Parses flags, runs, prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("configs", nargs="+", help="config files, with or without :variant")
  parser.add_argument("--folder", type=pathlib.Path, required=True, help="where workdirs lie")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--rates", type=float, nargs="+", help="default: the config's")
  parser.add_argument("--split", default="test", help="split that accuracy is measured on")
  args = parser.parse_args()
  rows = []
  for config, rate, seed in itertools.product(args.configs, args.rates or [None], args.seeds):
    fields = {"seed": seed, "eval.split": args.split}
    name = pathlib.Path(config).stem + config.partition(":")[2] + f"-seed{seed}"
    if rate is not None:
      fields["optimizer.learning_rate"] = rate
      name += f"-lr{rate:g}"
    workdir = args.folder / name
    args.folder.mkdir(parents=True, exist_ok=True)
    run(config, workdir, fields)
    rows.append((name, summary(workdir)))
    print(json.dumps({"run": name, **rows[-1][1]}), flush=True)
  print(table(rows))
  after = [row["sampled after"] for _, row in rows]
  print(f"sampled after: {statistics.median(after):.3f}, {min(after):.3f} to {max(after):.3f}")


if __name__ == "__main__":
  main()
