"""The processes of a run, one a host: what all of them do, and what one does for all.

All processes run the same program on the same prompts. Host code is repeated in each, so batches,
their packing and their random numbers do not depend on how many there are; devices share the work
through the mesh; a response is graded by one process, and its reward is told to all; files are
written by the first. The runtime that connects them is JAX's own.
"""

import contextlib
import importlib.util
import os
import pathlib
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from spo_jax.errors import USER_ERROR_STATUS, UserError

T = TypeVar("T")

# A process that is silent for so long, or does not end with the others, is taken for dead, and the
# others end.
SILENCE_S = 30
START_S = 300  # processes that have not all met by then give up
_TPU_DEVICES = (pathlib.Path("/dev/accel0"), pathlib.Path("/dev/vfio/0"))


def connect(coordinator: str, processes: int, process: int) -> None:
  """Joins the run's other processes; call it before JAX has looked for devices.

  Without a coordinator the machines are asked: TPU VMs, Slurm, and what else JAX knows find each
  other, and a machine by itself is a run of one process.

  Args:
    coordinator: HOST:PORT of the first process; "" asks the machines.
    processes: how many there are; read with a coordinator.
    process: number of this one, likewise.

  Raises:
    UserError: if the numbers do not fit, or the runtime cannot start. If the others do not come,
      the process ends.
  """
  # The runtime's own end of waiting is a crash, so ours comes before it.
  bounds = {
    "initialization_timeout": 2 * START_S,
    "heartbeat_timeout_seconds": SILENCE_S,
    "shutdown_timeout_seconds": SILENCE_S,
  }
  if not coordinator:
    if not in_cluster(os.environ):
      return
    where: dict[str, Any] = {}
  elif not 0 <= process < processes:
    raise UserError(
      f"--process_id={process} must be at least 0 and below --num_processes={processes}"
    )
  else:
    where = {
      "coordinator_address": coordinator,
      "num_processes": processes,
      "process_id": process,
    }
  with _patience(START_S):
    try:
      jax.distributed.initialize(**where, **bounds)
    except Exception as error:  # the runtime raises what its version does
      reason = " ".join(str(error).split())[:160]
      raise UserError(f"the run's processes did not find each other: {reason}") from error


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
  """Ends the process, with a word, if the block takes longer."""

  def end() -> None:
    line = f"spo_jax: the run's processes did not all come within {seconds:.0f} s: start them all"
    print(line, file=sys.stderr, flush=True)
    os._exit(USER_ERROR_STATUS)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def in_cluster(environment: Mapping[str, str]) -> bool:
  """Whether JAX can tell by itself which other processes there are.

  Args:
    environment: variables, as `os.environ`.
  """
  tasks = environment.get("SLURM_NTASKS", environment.get("OMPI_COMM_WORLD_SIZE", "1"))
  if int(tasks) > 1:
    return True
  if "cpu" in (environment.get("JAX_PLATFORMS") or ""):
    return False
  has_tpu = any(path.exists() for path in _TPU_DEVICES)
  return has_tpu and importlib.util.find_spec("libtpu") is not None


def count() -> int:
  """Number of processes."""
  return jax.process_count()


def is_first() -> bool:
  """Whether this process writes the files."""
  return jax.process_index() == 0


def first_then_all(work: Callable[[], T]) -> T:
  """work(), on the first process before the others: they find what it has written.

  Raises:
    UserError: on every process if the first raises one.
  """
  if count() == 1:
    return work()
  failure = None
  if is_first():
    try:
      done = work()
    except UserError as error:
      failure = error
  failed = bool(multihost_utils.broadcast_one_to_all(np.array(failure is not None)))
  if failure is not None:
    raise failure
  if failed:
    raise UserError("the first process has stopped, and tells why")
  return done if is_first() else work()


def meet(name: str) -> None:
  """Waits until all processes are here."""
  if count() > 1:
    multihost_utils.sync_global_devices(name)


def check_shared(folder: pathlib.Path) -> None:
  """Checks that what one process writes into a folder the others find there.

  Without it they would wait for each other's part of a checkpoint for ever.

  Args:
    folder: one that the first process can write to.

  Raises:
    UserError: on every process, if some process does not see the first one's file.
  """
  if count() == 1:
    return
  # A name that no file server can have told the others to be absent.
  path = folder / f".shared-{of_first(random.SystemRandom().getrandbits(31))}"
  if is_first():
    path.touch()
  meet("a file is written")
  missing = any_of(not path.exists())
  if is_first():
    path.unlink()
  if missing:
    raise UserError(
      f"'{folder}' is not on a disk that all processes of the run share: choose another --workdir, "
      "or, for training, give a shared config.checkpoint.folder, which may be gs://"
    )


def of_first(number: int) -> int:
  """A number of the first process, on all."""
  if count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.array(number)))


def any_of_each(*conditions: bool) -> tuple[bool, ...]:
  """Of each condition, whether it holds on some process."""
  if count() == 1:
    return conditions
  told = multihost_utils.process_allgather(np.array(conditions))
  return tuple(bool(some) for some in told.any(axis=0))


def any_of(condition: bool) -> bool:
  """Whether a condition holds on some process."""
  return any_of_each(condition)[0]


def share(size: int) -> slice:
  """Which of `size` things are this process's; the shares of all are in order, and all of them."""
  each = -(-size // count())
  begin = min(size, jax.process_index() * each)
  return slice(begin, min(size, begin + each))


def join_shares(own: np.ndarray, size: int) -> np.ndarray:
  """[size, ...] of what each process has for its `share`."""
  if count() == 1:
    return own
  padded = np.zeros((-(-size // count()), *own.shape[1:]), own.dtype)
  padded[: len(own)] = own
  return multihost_utils.process_allgather(padded).reshape(-1, *own.shape[1:])[:size]


def fetch(tree: Any) -> Any:
  """Arrays on the host, whole, on every process."""
  if count() == 1:
    return jax.device_get(tree)

  def one(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(one, tree)


def put(tree: Any, sharding: Callable[[Any], NamedSharding]) -> Any:
  """Arrays on the devices of all processes, each of which has all of them.

  Args:
    tree: arrays on the host or on a device of this process, typed PRNG keys among them.
    sharding: of an array, where it goes.
  """

  def one(x):
    lies = sharding(x)
    if lies.is_fully_addressable:
      return jax.device_put(x, lies)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = np.asarray(jax.random.key_data(x))
      return jax.random.wrap_key_data(_from_parts(data, lies), impl=jax.random.key_impl(x))
    return _from_parts(np.asarray(x), lies)

  return jax.tree.map(one, tree)


def _from_parts(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
