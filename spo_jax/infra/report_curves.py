"""The report's learning curves: which metric goes to which chart."""

from collections.abc import Mapping, Sequence
from typing import Any

from spo_jax.infra import report_charts as charts_lib
from spo_jax.infra.report_charts import Axis, Chart, Series

MAX_EXTRA_CHARTS = 24

Rows = Sequence[Mapping[str, Any]]


def column(rows: Rows, key: str) -> list[float | None]:
  """Values of one metric, None where it was not recorded."""
  return [row.get(key) for row in rows]


def _filled(values: Sequence[float | None]) -> list[float]:
  """Gaps take the value before them; 0 before the first."""
  filled, last = [], 0.0
  for value in values:
    last = last if value is None else value
    filled.append(last)
  return filled


def _rates(rows: Rows, count_key: str, seconds_key: str) -> list[float | None]:
  """Growth of a cumulative count per second of work."""
  totals = _filled(column(rows, count_key))
  rates: list[float | None] = []
  for i, row in enumerate(rows):
    seconds = row.get(seconds_key)
    known = row.get(count_key) is not None and seconds
    # The first line has no line before it to count from, unless it is the run's first iteration.
    grown = known and (i > 0 or row.get("iteration") == 1)
    rates.append((totals[i] - (totals[i - 1] if i else 0.0)) / seconds if grown else None)
  return rates


def _rest(rows: Rows) -> list[float | None]:
  """Seconds of each iteration that are neither rollout nor update."""
  elapsed = _filled(column(rows, "time/elapsed_s"))
  rest: list[float | None] = []
  for i, row in enumerate(rows):
    parts = (row.get("time/rollout_s"), row.get("time/update_s"))
    known = i > 0 and None not in parts and row.get("time/elapsed_s") is not None
    rest.append(max(0.0, elapsed[i] - elapsed[i - 1] - sum(parts)) if known else None)
  return rest


def _run_charts(rows: Rows) -> tuple[Chart, list[Chart], list[Chart]]:
  """The accuracy chart, the training charts, and one for each series that has no place in them."""

  def one(title: str, key: str, label: str, note: str = "", percent: bool = False) -> Chart:
    return Chart(title, [Series(key, label, column(rows, key))], percent=percent, note=note)

  accuracy = Chart(
    "Accuracy on the test questions",
    [
      Series("eval/accuracy", "sampled", column(rows, "eval/accuracy")),
      Series("eval/accuracy_greedy", "greedy", column(rows, "eval/accuracy_greedy")),
    ],
    kind="points",
    percent=True,
  )
  seconds = [
    Series("time/rollout_s", "rollout", column(rows, "time/rollout_s")),
    Series("time/update_s", "update", column(rows, "time/update_s")),
    Series("rest", "other", _rest(rows)),
  ]
  rates = [
    Series("sampling", "sampled", _rates(rows, "tokens/sampled", "time/rollout_s")),
    Series("training", "trained", _rates(rows, "tokens/trained", "time/update_s")),
  ]
  training = [
    one("Train reward", "train/reward_mean", "mean", "Mean reward of the sampled answers"),
    one("Loss", "train/loss", "policy", "The clipped surrogate, with the KL term if there is one"),
    one("KL", "train/kl", "to reference", "Distance from the reference policy, per token"),
    one(
      "Clip fraction",
      "train/clip_fraction",
      "tokens",
      "Share of trained tokens whose probability ratio left the clip range",
      percent=True,
    ),
    one("Gradient norm", "train/grad_norm", "before clipping"),
    one("Segments trained", "train/segments", "per iteration", "Those with an advantage not zero"),
    Chart(
      "Tokens per second", rates, note="Sampled per second of rollout, trained per second of update"
    ),
    Chart(
      "Seconds per iteration",
      seconds,
      kind="stack",
      note="Other: evaluation, grading, packing, checkpoints",
    ),
  ]
  shown = {s.key for chart in (accuracy, *training) for s in chart.series} | {"iteration"}
  shown |= {"time/elapsed_s", "tokens/sampled", "tokens/trained"}
  keys = dict.fromkeys(key for row in rows for key in row if key not in shown)
  extra = [
    one(key, key, "value")
    for key in keys
    if all(isinstance(row.get(key), int | float | None) for row in rows)
  ]
  return accuracy, training, extra[:MAX_EXTRA_CHARTS]


def curves(rows: Rows, warm: Rows) -> tuple[str, dict[str, Any]]:
  """The charts, and the data that the script reads out on hovering."""
  data: dict[str, Any] = {}
  parts = []
  if rows:
    axes = [
      Axis("iterations", "iteration", _filled(column(rows, "iteration"))),
      Axis("tokens", "sampled tokens", _filled(column(rows, "tokens/sampled"))),
      Axis("seconds", "elapsed time", _filled(column(rows, "time/elapsed_s"))),
    ]
    accuracy, training, extra = _run_charts(rows)
    evaluated = [i for i, row in enumerate(rows) if row.get("eval/accuracy") is not None]
    drawn = charts_lib.pick_rows(len(rows), evaluated)
    picks = "".join(
      f'<input class="pick" type="radio" name="x" id="x-{axis.name}"{" checked" if i == 0 else ""}>'
      for i, axis in enumerate(axes)
    )
    names = ("iterations", "sampled tokens", "time")
    labels = "".join(
      f'<label for="x-{axis.name}">{name}</label>' for axis, name in zip(axes, names, strict=True)
    )
    if charts_lib.has_data(accuracy):
      hero = charts_lib.figure(accuracy, axes, drawn, "run", span=3)
    else:
      hero = '<div class="card empty">No evaluation yet.</div>'
    text = "Faint: every iteration. Bold: moving average. Point at a chart to read all of them."
    parts.append(
      f'<section class="curves">{picks}<div class="switch"><h2>Learning curves</h2>'
      f'<div class="tabs">{labels}</div></div><div class="hero">{hero}</div>'
      f"{charts_lib.grid(training, axes, drawn, 'run')}"
      f'<p class="readout" id="readout" data-text="{text}">{text}</p>'
    )
    extra = [chart for chart in extra if charts_lib.has_data(chart)]
    if extra:
      parts.append(
        f"<details><summary>{len(extra)} more recorded series</summary>"
        f'<div class="more">{charts_lib.grid(extra, axes, drawn, "run")}</div></details>'
      )
    parts.append("</section>")
    data["run"] = charts_lib.chart_data([accuracy, *training, *extra], axes, drawn)
  if warm:
    axes = [Axis("steps", "step", _filled(column(warm, "step")))]
    charts = [
      Chart("Warm start: loss", [Series("loss", "cross-entropy", column(warm, "loss"))]),
      Chart(
        "Warm start: accuracy",
        [Series("accuracy", "validation", column(warm, "validation_accuracy"))],
        kind="points",
        percent=True,
      ),
    ]
    drawn = charts_lib.pick_rows(
      len(warm), [i for i, row in enumerate(warm) if row.get("validation_accuracy") is not None]
    )
    body = charts_lib.grid(charts, axes, drawn, "warm")
    parts.append(f"<section><h2>Warm start</h2>{body}</section>")
    data["warm"] = charts_lib.chart_data(charts, axes, drawn)
  return "".join(parts), data
