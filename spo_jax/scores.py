"""From graded responses to the figures that papers report, and a table of them."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from spo_jax.algorithms.voting import majority_at_k, pass_at_k

RIGHT = 1.0  # the least reward of a response that counts as right in pass@k and maj@k


def scores(lines: Sequence[dict[str, Any]], contexts: Iterable[int]) -> dict[str, Any]:
  """Figures of an evaluation.

  Args:
    lines: one a problem, as in `responses.jsonl`; all have as many responses.
    contexts: budgets at which responses were graded, in tokens.

  Returns:
    By context: `accuracy` (avg@n, the mean reward), its `stderr` over problems, `pass_at` and
    `maj_at` by k (powers of two, and n), `mean_tokens`, `truncated` (share), `grader_failures`; and
    by subject and by level, where problems have them, the accuracy at each context.
  """
  samples = len(lines[0]["responses"])
  contexts = sorted(contexts)
  summary = {
    "problems": len(lines),
    "samples": samples,
    "contexts": {str(context): _at_context(lines, context, samples) for context in contexts},
  }
  for field in ("subject", "level"):
    groups = defaultdict(list)
    for line in lines:
      groups[line[field]].append(line)
    if set(groups) != {""}:
      summary[f"by_{field}"] = {
        name or "unknown": {
          "problems": len(group),
          "accuracy": {str(context): _mean(group, context, "reward") for context in contexts},
        }
        for name, group in sorted(groups.items())
      }
  return summary


def _graded(line: dict[str, Any], context: int) -> list[dict[str, Any]]:
  return [response["at"][str(context)] for response in line["responses"]]


def _mean(lines: Sequence[dict[str, Any]], context: int, field: str) -> float:
  return statistics.fmean(float(at[field]) for line in lines for at in _graded(line, context))


def _at_context(lines: Sequence[dict[str, Any]], context: int, samples: int) -> dict[str, Any]:
  by_problem = [statistics.fmean(at["reward"] for at in _graded(line, context)) for line in lines]
  spread = statistics.stdev(by_problem) if len(lines) > 1 else 0.0
  right = [[at["reward"] >= RIGHT for at in _graded(line, context)] for line in lines]
  votes = [[at["vote"] for at in _graded(line, context)] for line in lines]
  ks = sorted({*(2**i for i in range(samples.bit_length())), samples})

  def over_problems(figure: Callable[[int, int], float]) -> dict[str, float]:
    return {str(k): statistics.fmean(figure(i, k) for i in range(len(lines))) for k in ks}

  found = {
    "accuracy": statistics.fmean(by_problem),
    "stderr": spread / len(lines) ** 0.5,
    "pass_at": over_problems(lambda i, k: pass_at_k(samples, sum(right[i]), k)),
  }
  if any(vote is not None for row in votes for vote in row):
    found["maj_at"] = over_problems(lambda i, k: majority_at_k(votes[i], right[i], k))
  room = lambda line: context - line["prompt_tokens"]
  found["mean_tokens"] = statistics.fmean(
    min(response["tokens"], room(line)) for line in lines for response in line["responses"]
  )
  found["truncated"] = _mean(lines, context, "truncated")
  found["grader_failures"] = sum(at["grader_failed"] for l in lines for at in _graded(l, context))
  return found


def table(summary: dict[str, Any]) -> list[str]:
  """Lines of text: a column a context, then accuracy by subject and level."""
  contexts = summary["contexts"]
  n = summary["samples"]
  lines = [
    f"{summary['model']} on {summary['data']} {summary['split']}: {summary['problems']} problems, "
    f"{n} {'response' if n == 1 else 'responses'} each"
  ]
  row = lambda label, cells: f"{label:<28}" + "".join(f"{cell:>16}" for cell in cells)
  each = lambda form: [form(figures) for figures in contexts.values()]
  percent = lambda x: f"{100 * x:.1f} %"
  lines.append(row("context", contexts))
  lines.append(
    row(f"avg@{n}", each(lambda f: f"{100 * f['accuracy']:.1f} ± {100 * f['stderr']:.1f} %"))
  )
  for name, label in (("pass_at", "pass"), ("maj_at", "maj")):
    for k in next(iter(contexts.values())).get(name, {}):
      if k != "1":
        lines.append(row(f"{label}@{k}", each(lambda f, k=k, name=name: percent(f[name][k]))))
  lines.append(row("mean response tokens", each(lambda f: f"{f['mean_tokens']:.0f}")))
  lines.append(row("truncated", each(lambda f: percent(f["truncated"]))))
  if any(each(lambda f: f["grader_failures"])):
    lines.append(row("grader failures", each(lambda f: f["grader_failures"])))
  for field in ("subject", "level"):
    for name, figures in summary.get(f"by_{field}", {}).items():
      label = f"{field} {name}" if field == "level" else name
      cells = [percent(x) for x in figures["accuracy"].values()]
      lines.append(row(f"{label} ({figures['problems']})", cells))
  return lines
