"""Results as Markdown."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.comparison.figures import CONFIDENCE, Interval, interval, paired
from benchmarks.comparison.rates import at_edge

Result = Mapping[str, Any]  # of an arm of a task, as `stages.Comparison.results` makes it

DIFFERENCE = 0.05  # from the budget, as a share of it, that is told


def spread(value: Interval | None, digits: int = 3, sign: str = "") -> str:
  """mean ± half the width of its interval."""
  if value is None:
    return ""
  text = f"{value.mean:{sign}.{digits}f}"
  return text if value.half is None else f"{text} ± {value.half:.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_seed(method: Mapping[str, Any], name: str) -> dict[int, float]:
  """A figure of each of a method's runs."""
  return {run["seed"]: run[name] for run in method["runs"]}


def page(result: Result) -> str:
  """The table of an arm of a task, that of its sweep, and what is to be said about both."""
  title = f"## {result['task']}, equal {result['arm']}: {result['budget']}"
  if result["arm"] == "own":
    title = f"## {result['task']}: {result['budget']}"
  if not result["methods"]:
    return f"{title}\n\nNo run is finished.\n"
  parts = [title, comparison_table(result), " ".join(notes(result))]
  if any(method["sweep"] for method in result["methods"]):
    parts += ["Mean final accuracy on the validation split, by rate:", sweep_table(result)]
    parts += [" ".join(sweep_notes(result))]
  if "command" in result:
    parts.append(f"Made on {result['date']} by `{result['command']}`.")
  return "\n\n".join(filter(None, parts)) + "\n"


def comparison_table(result: Result) -> str:
  """A row a method: what it spent, and what it reached."""
  first = result["methods"][0]
  against = f"against {first['name']}"
  header = ["method", "rate", "seeds", "iterations", "updates", "M tokens sampled", "seconds"]
  header += ["sampled, before", "sampled, after", against, "greedy, before", "greedy, after"]
  header += [against]
  rows = []
  for method in result["methods"]:
    mean: Callable[[str], float] = lambda name, m=method: statistics.fmean(
      by_seed(m, name).values()
    )
    row = [method["name"], f"{method['rate']:g}", str(len(method["runs"]))]
    row += [f"{mean('iteration'):.0f}", f"{mean('updates'):.0f}"]
    row += [f"{mean('sampled_tokens') / 1e6:.3g}", f"{mean('seconds'):.4g}"]
    for name in ("accuracy", "accuracy_greedy"):
      before, after = by_seed(method, f"{name}_before"), by_seed(method, name)
      row += [f"{statistics.fmean(before.values()):.3f}", spread(interval([*after.values()]))]
      row += ["" if method is first else spread(paired(after, by_seed(first, name)), sign="+")]
    rows.append(row)
  return markdown(header, rows)


def notes(result: Result) -> list[str]:
  """What the figures mean, and what is not as it should be."""
  methods = result["methods"]
  told = [
    f"Accuracy on the {result['split']} split, one sample a problem and greedy. ± is half the "
    f"width of the {CONFIDENCE:.0%} t-interval of the mean over seeds, each with a warm start, "
    f"prompts and random numbers of its own. Against {methods[0]['name']}: the difference of runs "
    "of the same seed, which begin with the same policy, and its interval. No interval is widened "
    "for the number of comparisons."
  ]
  source = "a calibration on its own" if methods[0]["pace"] else "the runs themselves"
  told.append(f"Seconds are iterations times those of a median one, by {source}.")
  for name in ("accuracy_before", "accuracy_greedy_before"):
    starts = [by_seed(method, name) for method in methods]
    differ = {s for a in starts for s in a if any(b.get(s, a[s]) != a[s] for b in starts)}
    if differ:
      told.append(f"{name} differs between methods in seeds {sorted(differ)}.")
  if result["arm"] == "tokens":
    told += _off_budget(methods)
  return told


def _off_budget(methods: Sequence[Mapping[str, Any]]) -> list[str]:
  told = []
  for method in methods:
    last = method["runs"][0]
    planned = method["pace"]["tokens"] * last["iteration"]
    share = statistics.fmean(by_seed(method, "sampled_tokens").values()) / planned - 1
    if abs(share) > DIFFERENCE:
      told.append(f"{method['name']} sampled {share:+.0%} of the tokens that it should have.")
  return told


def sweep_table(result: Result) -> str:
  """A row a method, a column a rate."""
  methods = [method for method in result["methods"] if method["sweep"]]
  rates = sorted({one["rate"] for method in methods for one in method["sweep"]})
  rows = []
  for method in methods:
    means = {one["rate"]: statistics.fmean(one["accuracies"]) for one in method["sweep"]}
    cell = lambda rate, m=method, a=means: (
      "" if rate not in a else f"**{a[rate]:.3f}**" if rate == m["rate"] else f"{a[rate]:.3f}"
    )
    rows.append([method["name"], *map(cell, rates)])
  return markdown(["method", *(f"{rate:g}" for rate in rates)], rows)


def sweep_notes(result: Result) -> list[str]:
  """How the rates were chosen, and where the grid did not do."""
  seeds = ", ".join(map(str, result["sweep_seeds"]))
  grid = ", ".join(f"{rate:g}" for rate in result["grid"])
  told = [f"Seeds {seeds}; the grid is {grid}, and the best rate of each method is bold."]
  if result["sweep_arm"] != result["arm"]:
    told.append(f"The sweep is that of the arm of equal {result['sweep_arm']}.")
  for method in result["methods"]:
    scores = {one["rate"]: one["accuracies"] for one in method["sweep"]}
    more = [f"{rate:g}" for rate in scores if rate not in result["grid"]]
    if more:
      told.append(
        f"For {method['name']} the best rate of the grid was at its edge: it was extended by "
        f"{', '.join(more)}."
      )
    if scores and at_edge(scores):
      told.append(f"The best rate of {method['name']} is still the last that was tried.")
  return told
