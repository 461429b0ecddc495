"""Orbax checkpoints of a run: asynchronous, atomic, all of its state."""

import contextlib
import dataclasses
import io
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from spo_jax.errors import UserError


class Checkpoints:
  """Checkpoints of one folder, named by step: each a pytree of arrays, a JSON dictionary and, where
  a run has them, host arrays of shapes that change.
  """

  def __init__(self, directory: pathlib.Path, *, keep: int):
    """Opens the folder, which is made if it does not exist; what a killed process left half written
    is removed.
    """
    self._directory = pathlib.Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(
      self._directory, options=options, item_names=("arrays", "record", "host_arrays")
    )

  def latest(self) -> int | None:
    """Step of the newest whole checkpoint."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    arrays: Any,
    record: dict[str, Any],
    host_arrays: dict[str, np.ndarray] | None = None,
  ) -> None:
    """Begins to write a checkpoint; the arrays are copied before this returns."""
    items = {"arrays": ocp.args.StandardSave(arrays), "record": ocp.args.JsonSave(record)}
    if host_arrays is not None:
      items["host_arrays"] = ocp.args.StandardSave({"npz": _to_bytes(host_arrays)})
    self._manager.save(step, args=ocp.args.Composite(**items), force=True)

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
    try:
      yield
    except Exception as error:  # Orbax, TensorStore and JSON raise a dozen kinds for a damaged file
      reason = str(error).strip().split("\n")[0][:160]
      raise UserError(
        f"checkpoint {self._directory / str(step)} cannot be read; it is damaged (delete that "
        "folder to go on from the one before) or of another model: "
        f"{type(error).__name__}: {reason}"
      ) from error

  def wait(self) -> None:
    """Waits until what was saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets the folder go."""
    self._manager.close()


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
