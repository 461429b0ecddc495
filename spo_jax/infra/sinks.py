"""Where metrics go besides `metrics.jsonl`: TensorBoard, and Weights & Biases if asked for."""

import json
import pathlib
import secrets
import time
from collections.abc import Mapping
from typing import Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from spo_jax.errors import UserError

TENSORBOARD_DIR = "tensorboard"
TENSORBOARD_FLUSH_S = 10
WANDB_ID_FILE = "wandb_id"
WANDB_ID_BYTES = 8


class Sink(Protocol):
  """What a `MetricWriter` mirrors its lines to."""

  def add(self, step: int, metrics: Mapping[str, int | float]) -> None:
    """Takes the finite numbers of a line; its step is the iteration."""

  def restart(self) -> None:
    """The record was cut back: steps that were added come again."""

  def close(self) -> None:
    """Passes on what is not yet passed on."""


def open_sinks(workdir: pathlib.Path, wandb_project: str) -> list[Sink]:
  """The sinks of a run.

  Args:
    workdir: folder of the run.
    wandb_project: project of Weights & Biases; "" leaves that out.

  Raises:
    UserError: if Weights & Biases is asked for and cannot be used.
  """
  sinks: list[Sink] = [TensorBoard(workdir)]
  return [*sinks, Wandb(workdir, wandb_project)] if wandb_project else sinks


class TensorBoard:
  """Event files in `tensorboard/`, one for each process of the run and for each restart."""

  def __init__(self, workdir: pathlib.Path):
    """The first file is made with the first line."""
    self._folder = workdir / TENSORBOARD_DIR
    self._events: EventFileWriter | None = None

  def add(self, step: int, metrics: Mapping[str, int | float]) -> None:
    """Adds an event with the numbers of a line."""
    if self._events is None:
      self._events = EventFileWriter(
        str(self._folder), flush_secs=TENSORBOARD_FLUSH_S, filename_suffix=f".{step}"
      )
      # Events of an earlier process at this step and later are not shown: they are made anew.
      begins = SessionLog(status=SessionLog.START)
      self._events.add_event(Event(wall_time=time.time(), step=step, session_log=begins))
    values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
    self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

  def restart(self) -> None:
    """The next line begins a new file, whose first step is the first that is made anew."""
    self.close()
    self._events = None

  def close(self) -> None:
    """Closes the file."""
    if self._events is not None:
      self._events.close()


class Wandb:
  """A run of Weights & Biases, one and the same for all processes of the workdir.

  It takes no step that is not above the last. What a resumed run does again it has already, with
  the seconds of the first time.
  """

  def __init__(self, workdir: pathlib.Path, project: str):
    """Begins or resumes the run; its config is the workdir's `config.json`.

    Raises:
      UserError: if the package is not installed, or refuses, as without a key.
    """
    try:
      from wandb import Error, init
    except ImportError as error:
      raise UserError(
        f"config.wandb={project} needs Weights & Biases, which is not installed: pip install wandb"
      ) from error
    try:
      self._run: Any = init(
        project=project,
        dir=str(workdir),
        id=_wandb_id(workdir),
        resume="allow",
        config=json.loads((workdir / "config.json").read_text()),
      )
    except Error as error:
      reason = " ".join(str(error).split())
      raise UserError(f"config.wandb={project} cannot be used: {reason}") from error

  def add(self, step: int, metrics: Mapping[str, int | float]) -> None:
    """Logs a line."""
    self._run.log(dict(metrics), step=step)

  def restart(self) -> None:
    """Does nothing: steps that come again are dropped."""

  def close(self) -> None:
    """Waits until all is sent."""
    self._run.finish()


def _wandb_id(workdir: pathlib.Path) -> str:
  """Id of the workdir's run, drawn when it is first asked for."""
  path = workdir / WANDB_ID_FILE
  if not path.exists():
    path.write_text(secrets.token_hex(WANDB_ID_BYTES))
  return path.read_text()
