"""What a run tells when something breaks, and how it ends: `python -m benchmarks.faults`.

  python -m benchmarks.faults --folder=runs/faults
  python -m benchmarks.faults --folder=runs/faults --only disk_full read_only

Breaks a run with a tiny model: its disk or that of its data is full, its folder read-only (on file
systems in memory, which only root can mount), every file of its newest checkpoint in turn cut,
zeroed or removed, one of two processes missing, its reward server killed. Each must end within its
bound and with the status that it should; where the fault passes, the same command must go on and
end as a run that nothing befell, and what is said of a damaged file must be no traceback.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.reward_server import PORT
from benchmarks.run_processes import (
  POLL_S,
  SIGNAL,
  TINY,
  flags,
  free_port,
  metrics_without_timings,
  start,
  wait_all,
)
from benchmarks.timing import command_parser, machine, run
from spo_jax.command_line import USER_ERROR_STATUS
from spo_jax.errors import UserError
from spo_jax.infra import hosts
from spo_jax.infra.metrics import read_metrics

CONFIG = "configs/spo_tree.py"
ITERATIONS = 6
FIELDS = {
  **TINY,
  **SIGNAL,
  "iterations": ITERATIONS,
  "optimizer.decay_steps": 0,  # else longer runs would have another schedule
  "rollout.prompts": 8,
  "checkpoint.every": 2,
  "eval.every": 2,
}
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
MOST_S = 180.0  # of a run whose fault is told at once, imports and compilation included
MOST_MEETING_S = hosts.START_S + 60.0
ROOM = "50m"  # more than a run writes
TOO_LITTLE_ROOM = "100k"  # less than the data set takes
LONG = 40  # iterations of a run that something befalls as it goes
BEFALLEN = 4  # lines of metrics by then
TRACEBACK = "Traceback"
SET_ASIDE = "set aside, resuming from"


class Ended(NamedTuple):
  """A run, or a start of it."""

  status: int
  seconds: float
  told: list[str]  # lines of this start's log


class Row(NamedTuple):
  """What is told of a fault."""

  fault: str
  statuses: list[int]  # of the starts, in order
  seconds: float  # from the fault to the end
  told: str


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = command_parser("faults", __doc__)
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
  return parser.parse_args(argv)


class Start:
  """The run of a folder, started."""

  def __init__(
    self,
    workdir: pathlib.Path,
    fields: Mapping[str, Any] = FIELDS,
    processes: int = 1,
    variables: Mapping[str, str] = ENVIRONMENT,
  ):
    self._workdir = workdir
    self._log = pathlib.Path(f"{workdir}.log.0")
    self._before = self._log.stat().st_size if self._log.exists() else 0
    self._began = time.monotonic()
    self.processes = start(CONFIG, flags(fields), workdir, processes, variables)

  def until_befallen(self) -> None:
    """Waits until so many lines of metrics are there, or the run has ended."""
    while len(read_metrics(self._workdir)) < BEFALLEN and self.processes[0].poll() is None:
      time.sleep(POLL_S)

  def ended(self, most_s: float) -> Ended:
    """Waits for the first process.

    Raises:
      UserError: if it has not ended in time; it is killed.
    """
    (status, *_), _ = wait_all(self.processes[:1], most_s)
    seconds = time.monotonic() - self._began
    told = self._log.read_bytes()[self._before :].decode(errors="replace").splitlines()
    return Ended(status, seconds, [line for line in told if line.strip()])


def whole(folder: pathlib.Path, iterations: int = ITERATIONS) -> pathlib.Path:
  """The run that nothing befell, made once."""
  workdir = folder / f"whole_{iterations}"
  if not (workdir / "report.html").exists():
    expect(Start(workdir, FIELDS | {"iterations": iterations}).ended(MOST_S), 0)
  return workdir


def expect(ended: Ended, status: int) -> Ended:
  """The same.

  Raises:
    UserError: if a run ended otherwise.
  """
  if ended.status != status:
    last = ended.told[-1] if ended.told else "nothing"
    raise UserError(f"status {ended.status} in place of {status}; it told, last: {last}")
  return ended


def expect_same(workdir: pathlib.Path, other: pathlib.Path) -> None:
  """Checks that two runs have the same metrics, seconds apart.

  Raises:
    UserError: naming the first that differs.
  """
  rows, others = map(metrics_without_timings, (workdir, other))
  if len(rows) != len(others):
    raise UserError(f"{workdir.name} has {len(rows)} lines of metrics in place of {len(others)}")
  for row, expected in zip(rows, others, strict=True):
    if row != expected:
      raise UserError(f"{workdir.name} differs in iteration {row['iteration']}")


@contextlib.contextmanager
def mounted(folder: pathlib.Path, options: str) -> Iterator[None]:
  """A file system in memory, for a while.

  Raises:
    UserError: if it cannot be mounted.
  """
  folder.mkdir(parents=True, exist_ok=True)
  command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
  made = subprocess.run(command, capture_output=True, text=True)
  if made.returncode:
    raise UserError(f"{folder} cannot be mounted: {made.stderr.strip()} (leave it out by --only)")
  try:
    yield
  finally:
    subprocess.run(["umount", folder], check=True)


def fill(path: pathlib.Path) -> None:
  """Writes a file until its disk is full."""
  with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
    while True:
      file.write(bytes(1 << 16))


def disk_full(folder: pathlib.Path) -> Iterator[Row]:
  """The disk gets full as the run goes, then it has room again."""
  workdir, filler = folder / "disk_full", folder / "disk_full" / "filler"
  with mounted(workdir, f"size={ROOM}"):
    begun = Start(workdir, FIELDS | {"iterations": LONG})
    begun.until_befallen()
    fill(filler)
    filled = time.monotonic()
    first = expect(begun.ended(MOST_S), USER_ERROR_STATUS)
    seconds = time.monotonic() - filled
    filler.unlink()
    again = expect(Start(workdir, FIELDS | {"iterations": LONG}).ended(MOST_S), 0)
    expect_same(workdir, whole(folder, LONG))
  yield Row("disk full, then room", [first.status, again.status], seconds, first.told[-1])


def disk_full_of_data(folder: pathlib.Path) -> Iterator[Row]:
  """The disk is full before the data set is written, then it has room."""
  workdir, disk = folder / "disk_full_of_data", folder / "data"
  shutil.rmtree(workdir, ignore_errors=True)
  fields = FIELDS | {"data.data_dir": str(disk)}
  with mounted(disk, f"size={TOO_LITTLE_ROOM}"):
    first = expect(Start(workdir, fields).ended(MOST_S), USER_ERROR_STATUS)
  with mounted(disk, f"size={ROOM}"):
    again = expect(Start(workdir, fields).ended(MOST_S), 0)
  expect_same(workdir, whole(folder))
  statuses = [first.status, again.status]
  yield Row("disk full of data, then room", statuses, first.seconds, first.told[-1])


def read_only(folder: pathlib.Path) -> Iterator[Row]:
  """The folder can be read only."""
  workdir = folder / "read_only"
  with mounted(workdir, "ro"):
    ended = expect(Start(workdir).ended(MOST_S), USER_ERROR_STATUS)
  yield Row("read-only folder", [ended.status], ended.seconds, ended.told[-1])


def cut(path: pathlib.Path) -> None:
  """Leaves the first half of a file."""
  os.truncate(path, path.stat().st_size // 2)


def zero(path: pathlib.Path) -> None:
  """Makes all of a file's bytes zero."""
  path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {"cut": cut, "zeroed": zero, "removed": pathlib.Path.unlink}


def damaged(folder: pathlib.Path) -> Iterator[Row]:
  """Every file of the newest checkpoint, damaged in every way: the run goes on from it, if the file
  is not needed, or from the one before.
  """
  base, longer = whole(folder), whole(folder, ITERATIONS + 2)
  newest = max((base / "checkpoints").iterdir(), key=lambda path: int(path.name))
  for file in sorted(path for path in newest.rglob("*") if path.is_file()):
    for how, damage in DAMAGES.items():
      workdir = folder / "damaged"
      shutil.rmtree(workdir, ignore_errors=True)
      shutil.copytree(base, workdir)
      damage(workdir / file.relative_to(base))
      name = f"{file.relative_to(newest)} {how}"
      ended = expect(Start(workdir, FIELDS | {"iterations": ITERATIONS + 2}).ended(MOST_S), 0)
      if any(TRACEBACK in line for line in ended.told):
        raise UserError(f"{name}: a traceback is told")
      expect_same(workdir, longer)
      told = [line for line in ended.told if SET_ASIDE in line or "resumed" in line]
      yield Row(name, [ended.status], ended.seconds, told[0] if told else "begun anew")


def missing_process(folder: pathlib.Path) -> Iterator[Row]:
  """The second of two processes does not come."""
  workdir = folder / "missing_process"
  shutil.rmtree(workdir, ignore_errors=True)
  begun = Start(workdir, processes=2)
  begun.processes[1].kill()
  ended = expect(begun.ended(MOST_MEETING_S), USER_ERROR_STATUS)
  yield Row("one of two processes missing", [ended.status], ended.seconds, ended.told[-1])


def listens(port: int) -> bool:
  """Whether somebody does there."""
  with contextlib.suppress(OSError), socket.create_connection(("localhost", port)):
    return True
  return False


@contextlib.contextmanager
def reward_server(port: int) -> Iterator[subprocess.Popen]:
  """The server that grades, for a while, from when it listens.

  Raises:
    UserError: if it ends before.
  """
  server = subprocess.Popen([sys.executable, "-m", "benchmarks.reward_server", str(port)])
  try:
    while not listens(port):
      if server.poll() is not None:
        raise UserError(f"the reward server ended with {server.returncode}")
      time.sleep(POLL_S)
    yield server
  finally:
    server.kill()
    server.wait()


def server_gone(folder: pathlib.Path) -> Iterator[Row]:
  """The reward server is killed, then it is back."""
  workdir = folder / "server_gone"
  shutil.rmtree(workdir, ignore_errors=True)
  fields = FIELDS | {"data.grader": "benchmarks.reward_server:ask", "iterations": LONG}
  port = free_port()
  variables = ENVIRONMENT | {PORT: str(port)}
  with reward_server(port) as server:
    begun = Start(workdir, fields, variables=variables)
    begun.until_befallen()
    server.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    first = expect(begun.ended(MOST_S), USER_ERROR_STATUS)
    seconds = time.monotonic() - killed
  with reward_server(port):
    again = expect(Start(workdir, fields, variables=variables).ended(MOST_S), 0)
    calm = folder / "server_there"
    shutil.rmtree(calm, ignore_errors=True)
    expect(Start(calm, fields, variables=variables).ended(MOST_S), 0)
  expect_same(workdir, calm)
  yield Row("reward server gone, then back", [first.status, again.status], seconds, first.told[-1])


FAULTS = {
  function.__name__: function
  for function in (disk_full, disk_full_of_data, read_only, damaged, missing_process, server_gone)
}


def measure(args: argparse.Namespace) -> None:
  """Breaks runs and prints what they told.

  Raises:
    UserError: if one does not end as it should.
  """
  folder = args.folder.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  found = 0
  for name in args.only:
    try:
      for row in FAULTS[name](folder):
        print(
          f"{row.fault}: status {row.statuses} after {row.seconds:.1f} s: {row.told}", flush=True
        )
        found += 1
    except UserError as error:
      raise UserError(f"{name}: {error}") from error
  print(json.dumps({"benchmark": "faults", "machine": machine(), "faults": found}))


def main(argv: Sequence[str] | None = None) -> int:
  """Breaks; returns the exit status."""
  return run("faults", measure, parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
