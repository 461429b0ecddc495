"""Runs that nobody trained: metrics as a run would have written them."""

import json
import pathlib

from benchmarks.comparison.runs import REPORT_FILE, Run


def rows(
  iterations: int, final: float, *, every: int = 4, tokens: int = 1000, seconds: float = 2.0
):
  """Lines of metrics whose accuracy goes from 0.2 to `final`; evaluations take 50 s more."""
  lines, elapsed = [], 3.0
  for i in range(iterations + 1):
    line = {"iteration": i, "tokens/sampled": tokens * i, "tokens/trained": tokens * i // 2}
    elapsed += 30.0 if i == 1 else seconds * (i > 0)  # the first compiles
    if i % every == 0 or i == iterations:
      accuracy = 0.2 + (final - 0.2) * i / iterations
      line |= {"eval/accuracy": accuracy, "eval/accuracy_greedy": accuracy + 0.1}
      elapsed += 50.0 * (i > 0)
    lines.append(line | {"time/elapsed_s": elapsed})
  return lines


def finish(run: Run, final: float, **how) -> None:
  """Puts a finished run where `run` would have been made."""
  run.prepare()
  write(run.workdir, rows(run.fields["iterations"], final, **how))
  (run.workdir / REPORT_FILE).touch()


def write(workdir: pathlib.Path, lines) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
