"""What a person sees in the terminal: bars that come and go, one line per iteration that stays.

Where the output is no terminal (a log file, a pipe, a notebook) there are no bars, and every line
is written whole and at once.
"""

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LABEL_STYLE = "dim"
BAD_STYLE = "bold red"


def compact(number: float) -> str:
  """Short form of a count: 812, 9.4k, 1.2M, 3.1B."""
  for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    # 999950 would be rounded to 1000.0k.
    if abs(number) >= size * 0.99995:
      return f"{number / size:.1f}{unit}"
  return f"{number:.0f}"


def clock(seconds: float) -> str:
  """Minutes and seconds, with hours where there are any: 01:12, 2:03:04."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


# Label, metric, width and form of its value; the last number ranks what a narrow terminal keeps.
_FIELDS: tuple[tuple[str, str, int, Callable[[float], str], int], ...] = (
  ("reward", "train/reward_mean", 5, "{:.2f}".format, 1),
  ("acc", "eval/accuracy", 9, "{:.2f}".format, 2),
  ("loss", "train/loss", 7, "{:.4f}".format, 3),
  ("kl", "train/kl", 6, "{:.4f}".format, 5),
  ("clip", "train/clip_fraction", 4, "{:.2f}".format, 7),
  ("gnorm", "train/grad_norm", 4, "{:.2f}".format, 6),
  ("segs", "train/segments", 4, compact, 8),
  ("sampled", "tokens/sampled", 6, compact, 9),
  ("trained", "tokens/trained", 6, compact, 10),
  ("roll", "time/rollout_s", 5, "{:.2f}s".format, 11),
  ("upd", "time/update_s", 5, "{:.2f}s".format, 12),
  ("elapsed", "time/elapsed_s", 5, clock, 4),
)


def _value(metrics: Mapping[str, Any], key: str, form: Callable[[float], str]) -> str:
  value = metrics.get(key)
  return "nan" if value is None or not math.isfinite(value) else form(value)


def summary_fields(metrics: Mapping[str, Any]) -> list[tuple[str, str, int]]:
  """(label, padded value, rank) of each field of a summary line; unrecorded ones are left out."""
  trained = any(key.startswith("train/") for key in metrics)
  fields = []
  for label, key, width, form, rank in _FIELDS:
    if key in metrics:
      value = _value(metrics, key, form)
      if label == "acc" and "eval/accuracy_greedy" in metrics:
        value += "/" + _value(metrics, "eval/accuracy_greedy", form)
    elif label == "acc" and trained:
      value = "-"  # Holds the column between evaluations.
    else:
      continue
    fields.append((label, value.rjust(width), rank))
  return fields


@dataclasses.dataclass(eq=False)
class _Bar:
  label: str
  total: int | None
  done: float = 0
  info: str = ""
  start: float = dataclasses.field(default_factory=time.monotonic)

  def cells(self) -> tuple[Any, ...]:
    elapsed = time.monotonic() - self.start
    count = f"{self.done:.0f}/{self.total}" if self.total else f"{self.done:.0f}"
    left = ""
    if self.total and self.done:
      left = f"{clock(elapsed / self.done * max(self.total - self.done, 0))} left"
    strip = ProgressBar(self.total, self.done, width=30, pulse=not self.total)
    cells = (count, clock(elapsed), left, self.info)
    return Text(f"{self.label:<10}"), strip, *(Text(cell, LABEL_STYLE) for cell in cells)


class Progress:
  """Bars and lines of one run.

  Use as a context manager, or call `close` at the end: bars that are still drawn are then removed.
  """

  def __init__(self, iterations: int, stream: TextIO | None = None):
    """Makes the display; nothing is drawn yet.

    Args:
      iterations: How many there will be.
      stream: Where to write; standard output by default.
    """
    self._iterations = iterations
    self._stream = stream or sys.stdout
    self._console = Console(file=self._stream, highlight=False)
    self._interactive = self._stream.isatty() and not self._console.is_dumb_terminal
    self._bars: list[_Bar] = []
    self._live: Live | None = None

  def _render(self) -> RenderableType:
    if not self._bars:
      return ""
    table = Table.grid(padding=(0, 2))
    for bar in list(self._bars):  # The drawing thread runs beside `bar`.
      table.add_row(*bar.cells())
    return table

  @contextlib.contextmanager
  def bar(self, label: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Draws a bar while the block runs; it leaves no trace.

    Args:
      label: What is going on.
      total: Number of steps; None if it is not known.

    Yields:
      `advance(n=1, **info)`: n more steps are done; `info` is shown beside the bar.
    """
    bar = _Bar(label, total)

    def advance(n: float = 1, **info: Any) -> None:
      bar.done += n
      if info and self._interactive:
        bar.info = "  ".join(
          f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
          for key, value in info.items()
        )

    self._bars.append(bar)
    if self._interactive and self._live is None:
      # One drawing thread for the whole run: starting it costs more than an iteration may.
      self._live = Live(
        console=self._console, get_renderable=self._render, refresh_per_second=8, transient=True
      )
      self._live.start()
    try:
      yield advance
    finally:
      self._bars.remove(bar)

  def summary(self, metrics: Mapping[str, Any]) -> None:
    """Writes the line of one iteration.

    A terminal that is too narrow gets the most important fields; anything else gets all of them.

    Args:
      metrics: A line of `metrics.jsonl`.
    """
    total = str(self._iterations)
    head = f"{int(metrics['iteration']):>{len(total)}}/{total}"
    fields = [("iter", head, 0), *summary_fields(metrics)]
    if self._interactive:
      while len(_join(fields)) >= self._console.width and len(fields) > 1:
        fields.remove(max(fields, key=lambda field: field[2]))
    line = Text()
    for label, value, _ in fields:
      line.append("  " if line else "").append(label, LABEL_STYLE).append(" ")
      line.append(value, BAD_STYLE if "nan" in value else "")
    self._write(line)

  def note(self, text: str) -> None:
    """Writes a line of text."""
    self._write(Text(text))

  def _write(self, line: Text) -> None:
    if self._interactive:
      if self._live is not None:
        self._live.refresh()  # Else a bar that has ended would be drawn once more below the line.
      self._console.print(line, soft_wrap=True)
    else:
      self._stream.write(line.plain + "\n")
      self._stream.flush()

  def close(self) -> None:
    """Removes the bars that are still drawn."""
    if self._live is not None:
      self._live.stop()
      self._live = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


@contextlib.contextmanager
def open_progress(iterations: int, *, visible: bool) -> Iterator[Progress]:
  """A `Progress` on standard output, or one that nobody sees: of the hosts of a run one tells."""
  with open(os.devnull, "w") as nowhere, Progress(iterations, None if visible else nowhere) as made:
    yield made


def _join(fields: list[tuple[str, str, int]]) -> str:
  return "  ".join(f"{label} {value}" for label, value, _ in fields)
