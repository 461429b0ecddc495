"""Tokens per second of a finished run, from its metrics: medians over iterations.

  python -m benchmarks.throughput runs/spo_tree

Iterations that compile, and those that share their time with an evaluation, are left out.
"""

import json
import pathlib
import platform
import statistics
import sys

from spo_jax.infra.metrics import read_metrics


def main(workdir: str) -> None:
  """Prints a line of JSON."""
  rows = read_metrics(pathlib.Path(workdir))
  used = []
  for before, row in zip(rows[1:], rows[2:], strict=False):
    if "eval/accuracy" not in row:
      used.append((row, row["tokens/sampled"] - before["tokens/sampled"]))
  if not used:
    sys.exit(f"{workdir} has no iteration that neither compiled nor evaluated: give a longer run")
  spread = lambda values: [round(f(values), 3) for f in (min, statistics.median, max)]
  print(
    json.dumps(
      {
        "machine": f"{platform.processor() or platform.machine()}, JAX on the devices of the run",
        "iterations": len(used),
        "sampled tokens/s": spread([n / row["time/rollout_s"] for row, n in used]),
        "packed tokens/s": spread(
          [row["train/packed_tokens"] / row["time/update_s"] for row, _ in used]
        ),
        "seconds sampling": spread([row["time/rollout_s"] for row, _ in used]),
        "seconds grading": spread([row["time/grade_s"] for row, _ in used]),
        "seconds packing": spread([row["time/pack_s"] for row, _ in used]),
        "seconds update": spread([row["time/update_s"] for row, _ in used]),
        "row fill": spread([row["train/row_fill"] for row, _ in used]),
      },
      indent=2,
    )
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
