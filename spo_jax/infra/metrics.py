"""What a run records: one JSON object a line in `metrics.jsonl`, mirrored to sinks."""

import hashlib
import json
import math
import numbers
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from spo_jax.errors import UserError
from spo_jax.infra.sinks import Sink

METRICS_FILE = "metrics.jsonl"

Path = str | os.PathLike[str]


def _plain(value: Any) -> int | float | None:
  """Python number of any scalar; None for what JSON cannot hold (NaN and the infinities)."""
  if value is None:
    return None
  if isinstance(value, numbers.Integral):
    return int(value)
  value = float(value)
  return value if math.isfinite(value) else None


def json_line(metrics: Mapping[str, Any]) -> bytes:
  """One line of strict JSON in the order of `metrics`; NaN and infinities become null."""
  plain = {key: _plain(value) for key, value in metrics.items()}
  return (json.dumps(plain, allow_nan=False) + "\n").encode()


def append_line(path: Path, metrics: Mapping[str, Any]) -> None:
  """Appends one line to a JSON-lines file, which is opened and closed again."""
  with open(path, "ab") as file:
    file.write(json_line(metrics))


def read_lines(path: Path) -> list[dict[str, Any]]:
  """Reads a JSON-lines file.

  A last line that was torn (the process died while it wrote, or writes right now) is left out,
  and a file that does not exist holds no lines.

  Args:
    path: The file.

  Returns:
    One dict a line.

  Raises:
    UserError: If a line other than the last is no JSON object.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  lines = path.read_bytes().splitlines()
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      if not isinstance(row, dict):
        raise ValueError("not an object")
    except ValueError as error:
      if number == len(lines):
        break
      raise UserError(f"{path}: line {number} is not a JSON object") from error
    rows.append(row)
  return rows


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
  """Reads the metrics that a run has recorded so far; see `read_lines`."""
  return read_lines(pathlib.Path(workdir) / METRICS_FILE)


class MetricWriter:
  """Appends to `metrics.jsonl`, and mirrors its numbers to sinks.

  Every line reaches the operating system before `write` returns, so a killed process loses at most
  the line it was writing. A checkpoint stores `position()`; the resumed run hands it to `restore`.
  """

  def __init__(self, workdir: Path, sinks: Sequence[Sink] = ()):
    """Opens the record of `workdir`, which is made if it does not exist.

    Args:
      workdir: The folder.
      sinks: Where lines go too; the writer closes them.
    """
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._path = workdir / METRICS_FILE
    self._sinks = sinks
    self._file = open(self._path, "ab", buffering=0)
    content = self._path.read_bytes()
    # A torn last line would swallow the next one.
    self._keep(content[: content.rfind(b"\n") + 1])

  def _keep(self, content: bytes) -> None:
    os.truncate(self._path, len(content))
    self._bytes = len(content)
    self._hash = hashlib.sha256(content)

  def write(self, metrics: Mapping[str, float | int]) -> None:
    """Appends one line; its step in the sinks is its `iteration`."""
    line = json_line(metrics)
    self._file.write(line)
    self._bytes += len(line)
    self._hash.update(line)
    plain = {key: _plain(value) for key, value in metrics.items() if key != "iteration"}
    finite = {key: value for key, value in plain.items() if value is not None}
    for sink in self._sinks:
      sink.add(int(metrics["iteration"]), finite)

  def position(self) -> dict[str, int | str]:
    """Where the record stands: its size, the SHA-256 of its content, and that. Goes into a
    checkpoint, which may outlive the disk that the record is on.
    """
    content = self._path.read_bytes()[: self._bytes].decode()
    return {"bytes": self._bytes, "sha256": self._hash.hexdigest(), "content": content}

  def restore(self, position: Mapping[str, int | str]) -> None:
    """Cuts the record back to what it was at `position()`; the resumed run makes the rest anew.

    A record that is gone, as on a new machine, is written again.

    Args:
      position: What `position()` returned when the checkpoint was made.

    Raises:
      UserError: If the record is shorter than it was, or its kept part is not what it was.
    """
    size = int(position["bytes"])
    content = self._path.read_bytes()
    if not content:
      content = str(position["content"]).encode()
      self._path.write_bytes(content)
    advice = "put the file back, or train in a new workdir"
    if len(content) < size:
      raise UserError(
        f"{self._path} has {len(content)} bytes but the checkpoint was made at {size}: {advice}"
      )
    content = content[:size]
    if hashlib.sha256(content).hexdigest() != position["sha256"]:
      raise UserError(f"{self._path} is not the file that the checkpoint was made with: {advice}")
    self._keep(content)
    for sink in self._sinks:
      sink.restart()

  def clear(self) -> None:
    """Empties the record, for a run that begins, or begins again before its first checkpoint."""
    self._keep(b"")

  def close(self) -> None:
    """Closes the record and the sinks."""
    self._file.close()
    for sink in self._sinks:
      sink.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


class NoWriter:
  """Stands for a `MetricWriter` in the processes that write nothing."""

  def write(self, metrics: Mapping[str, float | int]) -> None:
    """Does nothing."""

  def position(self) -> dict[str, int | str]:
    """Nothing; the first process's position goes into the checkpoint."""
    return {}

  def restore(self, position: Mapping[str, int | str]) -> None:
    """Does nothing."""

  def clear(self) -> None:
    """Does nothing."""

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass
