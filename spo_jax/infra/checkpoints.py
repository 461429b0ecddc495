"""Orbax checkpoints of a run: asynchronous, atomic, all of its state."""

import asyncio
import contextlib
import dataclasses
import io
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from spo_jax.errors import UserError
from spo_jax.infra import hosts

T = TypeVar("T")

_SCORE = "score"  # name of a checkpoint's metric


class Checkpoints:
  """Checkpoints of one folder, named by step: each a pytree of arrays, a JSON dictionary and, where
  a run has them, host arrays of shapes that change.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int, keep_best: int = 0):
    """Opens the folder, which is made if it does not exist; what a killed process left half written
    is removed.

    Args:
      directory: local or gs://.
      keep: newest checkpoints that are kept.
      keep_best: others that are kept, those with the best score.
    """
    best = managers.BestN(
      get_metric_fn=lambda metrics: metrics[_SCORE],
      n=keep_best,
      keep_checkpoints_without_metrics=False,
    )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep), best]),
      cleanup_tmp_directories=True,
    )
    try:
      folder = epath.Path(directory)
      self._directory = folder if "://" in str(directory) else folder.absolute()
      self._manager = ocp.CheckpointManager(
        self._directory, options=options, item_names=("arrays", "record", "host_arrays")
      )
    except OSError as error:
      reason = error.strerror or error
      raise UserError(f"checkpoints cannot be kept in {directory}: {reason}") from error
    except ImportError as error:  # names the package that a bucket needs
      raise UserError(f"checkpoints cannot be kept in {directory}: {error}") from error

  def latest(self) -> int | None:
    """Step of the newest whole checkpoint."""
    return self._manager.latest_step()

  def read_newest(self, read: Callable[[int], T], note: Callable[[str], None]) -> T | None:
    """read(step) of the newest checkpoint that can be read; None if there are none.

    Newer ones, which are damaged, are moved to a folder beside this one, and told of.

    Raises:
      UserError: if there are some, and none can be read; that of the newest.
    """
    errors: dict[int, UserError] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        found = read(step)
      except UserError as error:
        errors[step] = error
      if hosts.any_of(step in errors):
        errors.setdefault(step, UserError("another process cannot read it"))
        continue
      for damaged, error in errors.items():
        self._set_aside(damaged)
        note(f"{error}; set aside, resuming from {step}")
      return found
    if errors:
      raise errors[max(errors)]
    return None

  def _set_aside(self, step: int) -> None:
    damaged = self._directory.parent / f"{self._directory.name}_damaged" / str(step)
    if hosts.is_first():
      damaged.parent.mkdir(exist_ok=True)
      damaged.rmtree(missing_ok=True)
      (self._directory / str(step)).rename(damaged)
    hosts.meet(f"checkpoint {step} is set aside")
    self._manager.reload()

  def save(
    self,
    step: int,
    arrays: Any,
    record: dict[str, Any],
    host_arrays: dict[str, np.ndarray] | None = None,
    score: float | None = None,
  ) -> None:
    """Begins to write a checkpoint; the arrays are copied before this returns.

    Raises:
      UserError: if this one or the one before cannot be written.
    """
    items = {"arrays": ocp.args.StandardSave(arrays), "record": ocp.args.JsonSave(record)}
    if host_arrays is not None:
      items["host_arrays"] = ocp.args.StandardSave({"npz": _to_bytes(host_arrays)})
    metrics = None if score is None else {_SCORE: score}
    with self._writing():
      self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the pytree of arrays and the dictionary of a checkpoint.

    Args:
      step: as `latest` returned it.
      like: arrays or ShapeDtypeStructs with shardings, of the structure that was saved.

    Raises:
      UserError: if the checkpoint is damaged or of another model.
    """
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    with self._reading(step):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          arrays=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore()
        ),
      )
      return restored.arrays, restored.record

  def restore_host_arrays(self, step: int) -> dict[str, np.ndarray]:
    """Reads the host arrays of a checkpoint.

    Raises:
      UserError: if the checkpoint is damaged or was saved without them.
    """
    with self._reading(step):
      items = ocp.args.Composite(host_arrays=ocp.args.StandardRestore())
      return _from_bytes(self._manager.restore(step, args=items).host_arrays["npz"])

  @contextlib.contextmanager
  def _reading(self, step: int):
    policy = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientPolicy())
    try:
      yield
    except Exception as error:  # Orbax, TensorStore and JSON raise a dozen kinds for a damaged file
      reason = str(error).strip().split("\n")[0][:160]
      raise UserError(
        f"checkpoint {self._directory / str(step)} cannot be read: it is damaged or of "
        "another model (delete that folder to begin anew): "
        f"{type(error).__name__}: {reason}"
      ) from error
    finally:
      asyncio.set_event_loop_policy(policy)

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    except Exception as error:  # of the file system, told by Orbax and TensorStore in their ways
      reason = " ".join(str(error).split())[-160:]  # what the system said comes last
      raise UserError(
        f"a checkpoint cannot be written to {self._directory}: {type(error).__name__}: {reason}; "
        "the ones before are whole, and the same command resumes from the newest"
      ) from error

  def wait(self) -> None:
    """Waits until what was saved is on disk.

    Raises:
      UserError: if it cannot be written.
    """
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets the folder go.

    Raises:
      UserError: as `wait`.
    """
    with self._writing():
      self._manager.close()


class _PatientLoop(asyncio.SelectorEventLoop):
  """An event loop that is closed when all of its tasks have ended.

  Orbax closes its loop at the first array that cannot be read; TensorStore then answers for the
  others into the closed loop, and each answer prints a traceback over what the user is told.
  """

  def close(self) -> None:
    if tasks := asyncio.all_tasks(self):
      self.run_until_complete(asyncio.wait(tasks))
    super().close()


class _PatientPolicy(asyncio.DefaultEventLoopPolicy):
  """Gives out patient loops."""

  def new_event_loop(self) -> asyncio.AbstractEventLoop:
    return _PatientLoop()


def _to_bytes(arrays: dict[str, np.ndarray]) -> np.ndarray:
  """One uint8 array in the format of `numpy.savez`: Orbax stores no arrays of size zero, and the
  format has a checksum of each.
  """
  with io.BytesIO() as file:
    np.savez(file, **arrays)
    return np.frombuffer(file.getvalue(), np.uint8)


def _from_bytes(data: np.ndarray) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(data.tobytes())) as arrays:
    return dict(arrays)


@dataclasses.dataclass
class Counters:
  """Running totals of a run; part of its checkpoints."""

  iteration: int = 0
  tokens_sampled: int = 0
  tokens_trained: int = 0
  elapsed_s: float = 0.0  # up to the checkpoint, all processes of the run together
  # Unix time at which the run began; one without a checkpoint begins anew.
  began_at: float = dataclasses.field(default_factory=time.time)
  trained_s: float = 0.0  # in iterations, from their sampling to the end of their update
