"""The report of a run, one HTML page; `spo_jax/report.py` is its command line.

The page can be made at any time, also while the run is under way. It reads from the workdir, each
if it is there: `config.json`, `metrics.jsonl`, `warm_start.jsonl`, `rollouts/first.json` and
`rollouts/last.json`.
"""

import html
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from spo_jax.errors import UserError
from spo_jax.infra import metrics as metrics_lib
from spo_jax.infra import report_tree
from spo_jax.infra.progress import clock, compact
from spo_jax.infra.report_assets import CSS, HOW_TO_READ, SCRIPT
from spo_jax.infra.report_curves import Rows, column, curves

REPORT_FILE = "report.html"
MAX_BYTES = 1_000_000
# Tokens drawn of each tree: the first with which the page stays below `MAX_BYTES`.
TOKEN_BUDGETS = (10_000, 5_000, 2_500, 1_000, 0)

METHODS = {"tree": "SPO-tree", "chain": "SPO-chain", "group": "Group baseline"}
GROUP_METHODS = {"normalized": "GRPO", "leave_one_out": "RLOO"}


def _read_json(path: pathlib.Path) -> Any:
  """Content of a JSON file, None if there is none."""
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is not valid JSON: {error}") from error


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} -> {"a.b": 1}."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def _setting(flat: Mapping[str, Any], *names: str) -> Any:
  """Value of the first setting with one of these names, in whatever section it stands."""
  for name in names:
    for key, value in flat.items():
      if key.rsplit(".", 1)[-1] == name and value is not None:
        return value
  return None


def _stat(name: str, value: str, detail: str = "", css: str = "") -> str:
  small = f'<small class="{css}">{detail}</small>' if detail else ""
  return f'<div class="stat"><dt>{name}</dt><dd>{value}{small}</dd></div>'


def _accuracy_stat(name: str, rows: Rows, key: str) -> str:
  values = [value for value in column(rows, key) if value is not None]
  if not values:
    return _stat(name, "–", "not evaluated yet")
  first, last = 100 * values[0], 100 * values[-1]
  if len(values) == 1:
    return _stat(name, f"{first:.1f}%", "one evaluation")
  gain = last - first
  detail = f"{gain:+.1f} points".replace("-", "−")
  value = f'<span class="from">{first:.1f} →</span> {last:.1f}%'
  return _stat(name, value, detail, "up" if gain > 0 else "down" if gain < 0 else "")


def _last(rows: Rows, key: str) -> float | None:
  return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def _stats(rows: Rows, planned: int | None) -> str:
  """The headline row."""
  done = _last(rows, "iteration")
  sampled, trained = _last(rows, "tokens/sampled"), _last(rows, "tokens/trained")
  elapsed = _last(rows, "time/elapsed_s")
  share = f"{100 * trained / sampled:.0f}% of those sampled" if sampled and trained else ""
  cells = [
    _accuracy_stat("Sampled accuracy", rows, "eval/accuracy"),
    _accuracy_stat("Greedy accuracy", rows, "eval/accuracy_greedy"),
    _stat("Iterations", "–" if done is None else f"{done:.0f}", f"of {planned}" if planned else ""),
    _stat("Sampled tokens", "–" if sampled is None else compact(sampled)),
    _stat("Trained tokens", "–" if trained is None else compact(trained), share),
    _stat("Time", "–" if elapsed is None else clock(elapsed)),
  ]
  return f'<dl class="stats card">{"".join(cells)}</dl>'


def _trees(rollouts: Mapping[str, Mapping[str, Any]], budget: int) -> str:
  """The rollouts of the first and of the last iteration, one shown at a time."""
  if not rollouts:
    return ""
  scale = report_tree.advantage_scale(list(rollouts.values()))
  names = list(rollouts)
  threshold = rollouts[names[-1]].get("threshold") or 1.0
  picks = "".join(
    f'<input class="pick" type="radio" name="t" id="t-{name}"'
    f"{' checked' if name == names[-1] else ''}>"
    for name in names
  )
  labels = "".join(
    f'<label for="t-{name}">{name} iteration ({rollout["iteration"]})</label>'
    for name, rollout in rollouts.items()
  )
  panes = "".join(
    f'<div class="pane-{name}">{report_tree.render(report_tree.make_tree(rollout, scale, budget))}'
    "</div>"
    for name, rollout in rollouts.items()
  )
  return (
    f'<section class="curves">{picks}<div class="switch"><h2>One question, its rollout</h2>'
    f'<div class="tabs">{labels}</div></div>{report_tree.legend(scale, threshold)}{panes}</section>'
  )


def _config_tables(config: Mapping[str, Any]) -> str:
  """The settings, one table a section."""
  if not config:
    return ""
  sections: dict[str, dict[str, Any]] = {}
  for key, value in flatten(config).items():
    section, _, name = key.rpartition(".")
    sections.setdefault(section, {})[name] = value
  tables = []
  for section, settings in sections.items():
    lines = "".join(
      f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(_shown(value))}</td></tr>'
      for name, value in settings.items()
    )
    caption = html.escape(section or "general")
    tables.append(f'<table class="card"><caption>{caption}</caption><tbody>{lines}</tbody></table>')
  return f'<section><h2>Configuration</h2><div class="config">{"".join(tables)}</div></section>'


def _shown(value: Any) -> str:
  return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _method(flat: Mapping[str, Any], rollouts: Mapping[str, Any]) -> str:
  """Name of the method: the config's, else the rollouts'."""
  method = _setting(flat, "method", "strategy")
  if method is None and rollouts:
    method = next(iter(rollouts.values())).get("method")
  method = str(method or "Segment Policy Optimization")
  key = method.lower().removeprefix("spo").strip("-_ ")
  if key == "group" and (name := GROUP_METHODS.get(flat.get("advantage.kind"))):
    return name
  return METHODS.get(key, method)


def _page(
  config: Mapping[str, Any], rows: Rows, warm: Rows, rollouts: Mapping[str, Any], budget: int
) -> str:
  flat = flatten(config)
  title = _method(flat, rollouts)
  source = _setting(flat, "config_file", "config_path")
  planned = _setting(flat, "iterations", "num_iterations", "total_iterations", "max_iterations")
  planned = planned if isinstance(planned, int) else None
  done = _last(rows, "iteration")
  status = ""
  if done is None:
    status = "no metrics yet"
  elif planned and done < planned:
    status = f"iteration {done:.0f} of {planned}"
  badge = f'<span class="status">{status}</span>' if status else ""
  from_file = f" from <code>{html.escape(str(source))}</code>" if source else ""
  charts, data = curves(rows, warm)
  blob = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>{html.escape(title)}: run report</title><style>{CSS}</style></head><body><main>"
    f'<header><h1>{html.escape(title)}</h1><p class="sub">Segment Policy Optimization run'
    f"{from_file}{badge}</p></header>{_stats(rows, planned)}{charts}{_trees(rollouts, budget)}"
    f"{_config_tables(config)}{HOW_TO_READ}</main>"
    f'<script type="application/json" id="data">{blob}</script><script>{SCRIPT}</script>'
    "</body></html>\n"
  )


def write_report(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Writes `report.html` in one step, so that a reader never sees half of it.

  Args:
    workdir: Folder of the run.

  Returns:
    Path of the page.

  Raises:
    UserError: If there is no such folder or one of its files cannot be read.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise UserError(f"{workdir} is not a folder")
  config = _read_json(workdir / "config.json") or {}
  rows = metrics_lib.read_metrics(workdir)
  warm = metrics_lib.read_lines(workdir / "warm_start.jsonl")
  rollouts = {
    name: rollout
    for name in ("first", "last")
    if (rollout := _read_json(workdir / "rollouts" / f"{name}.json"))
  }
  for budget in TOKEN_BUDGETS:
    content = _page(config, rows, warm, rollouts, budget).encode()
    if len(content) < MAX_BYTES:
      break
  path = workdir / REPORT_FILE
  unfinished = path.with_suffix(".html.tmp")
  unfinished.write_bytes(content)
  unfinished.replace(path)
  return path
