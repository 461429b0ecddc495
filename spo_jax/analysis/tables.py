"""What the instrument found, as JSON and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from spo_jax.analysis.alignment import Alignment, Figure
from spo_jax.analysis.values import Judged


def figure(value: Figure, digits: int = 3) -> str:
  """An estimate and its standard error."""
  return f"{value.value:.{digits}f} ± {value.error:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table, the first column to the left."""
  rule = ["---", *["---:"] * (len(head) - 1)]
  return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def value_table(judged: Sequence[Judged]) -> str:
  """Methods by how good their advantages are."""
  head = ("method", "size", "tokens a prompt", "slope", "correlation", "rmse", "bias", "deviation")
  head += ("sign", "ranks right")
  rows = []
  for row in judged:
    result = row.decisions
    rows.append(
      [
        row.method,
        row.size,
        f"{row.tokens:.0f}",
        figure(row.all_tokens.slope, 2),
        figure(result.correlation),
        *(f"{value:.3f}" for value in (result.rmse, result.bias, result.deviation, result.sign)),
        figure(row.ranking, 2),
      ]
    )
  return table(head, rows)


def gradient_table(aligned: Mapping[str, Sequence[Alignment]]) -> str:
  """Methods by their gradients, the best of the largest updates first."""
  head = ("method", "tokens an update", "prompts", "cosine", "of the mean gradient")
  head += ("signal to noise", "cosine after Adam")
  blocks = []
  for at_budget in zip(*aligned.values(), strict=True):
    named = sorted(zip(aligned, at_budget, strict=True), key=lambda pair: -pair[1].cosine.value)
    blocks += [
      [
        name,
        f"{row.tokens:.0f}",
        str(row.prompts),
        figure(row.cosine),
        figure(row.mean_cosine),
        figure(row.signal_to_noise),
        figure(row.adam_cosine),
      ]
      for name, row in named
    ]
  return table(head, blocks)


def as_json(value: Any) -> Any:
  """Named tuples as dictionaries, all the way down."""
  if hasattr(value, "_asdict"):
    return {name: as_json(item) for name, item in value._asdict().items()}
  if isinstance(value, Mapping):
    return {name: as_json(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [as_json(item) for item in value]
  return value


def page(report: Mapping[str, Any], judged: Sequence[Judged], aligned) -> str:
  """The Markdown page."""
  check, trust = report["truth"], report.get("true_gradient")
  parts = [
    f"# Credit assignment of {report['policy']}",
    f"{report['workdir']}, split {report['split']}, {report['prompts']} prompts, "
    f"{report['trajectories']} trajectories; mean reward {report['mean_reward']:.3f}.",
    "## Advantages",
    f"True advantages of {check['tokens']} tokens, from {report['rollouts']} rollouts a state: "
    f"the standard error of one is {check['error']:.3f}, their spread {check['spread']:.3f}; "
    "those from one half of the rollouts and from the other correlate with "
    f"{check['correlation']:.3f}. Below, the {report['decisions']} tokens of probability below "
    f"ρ = {report['threshold']}.",
    "slope: E[Â A*] / E[A*²] over all tokens. bias: root of the mean square of E Â - A* given the "
    "trajectory (of a chain or tree with its whole segment, of a response method up to the token). "
    "deviation: root of the mean variance. sign: share of draws with the sign of A*, where that is "
    "certain. ranks right: pairs of continuations of "
    f"{report['rank_tokens']} tokens of one prompt. Errors are by the jackknife over prompts; few "
    "prompts make them too small.",
    value_table(judged),
  ]
  if aligned:
    parts += [
      "## Gradients",
      f"The true gradient is RLOO's over every token, from {trust['tokens']:.3g} sampled tokens: "
      f"its halves have cosine {trust['halves']:.3f}, and it has {trust['own']:.3f} to the truth, "
      "which is taken out of the cosines below.",
      gradient_table(aligned),
    ]
  return "\n\n".join(parts) + "\n"
