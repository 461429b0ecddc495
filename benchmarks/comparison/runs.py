"""Training runs in processes of their own: several at a time, begun, gone on with, or done already.

A run holds a lock on its log for as long as it lives, so one that outlives a killed comparison is
waited for, not made a second time in the same folder.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from benchmarks.run_processes import flags
from spo_jax.errors import UserError
from spo_jax.infra.metrics import read_metrics

COMMAND_FILE = "command.json"
REPORT_FILE = "report.html"  # written last
WARM_START = ("warm_start*", "data", "*tokenizer*")  # what a run takes over from another
POLL_S = 0.2
STOP_S = 20.0  # that a process has to end when it is told to


@dataclasses.dataclass(frozen=True)
class Run:
  """A run to be made."""

  workdir: pathlib.Path
  config: str  # FILE:variant
  fields: Mapping[str, Any]  # `iterations` among them
  start: pathlib.Path | None = None  # workdir of the run whose warm start it takes

  @property
  def flags(self) -> list[str]:
    """The command line but for the program and the workdir."""
    return [f"--config={self.config}", *flags(self.fields)]

  @property
  def command(self) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "spo_jax.main", f"--workdir={self.workdir}", *self.flags]

  @property
  def told(self) -> str:
    """The command line as one writes it in a shell."""
    return shlex.join(["python", *self.command[1:]])

  @property
  def log(self) -> pathlib.Path:
    """What the process prints, beside the workdir."""
    return self.workdir.with_name(self.workdir.name + ".log")

  def finished(self) -> bool:
    """Whether all is done."""
    if not (self.workdir / REPORT_FILE).exists():
      return False
    rows = read_metrics(self.workdir)  # a report may be made at any time
    return bool(rows) and rows[-1]["iteration"] >= self.fields["iterations"]

  def check(self) -> None:
    """Checks that what the workdir holds, if anything, is this run.

    Raises:
      UserError: if it was begun with other settings.
    """
    path = self.workdir / COMMAND_FILE
    if path.exists() and (old := json.loads(path.read_text())["flags"]) != self.flags:
      changed = sorted(set(old) ^ set(self.flags))
      raise UserError(
        f"{self.workdir} holds a run with other settings ({' '.join(changed)}): choose another "
        "--folder, or delete it"
      )

  def prepare(self) -> None:
    """Makes the workdir, with its warm start in it, in one step."""
    if self.workdir.exists():
      return
    made = self.workdir.with_name(self.workdir.name + ".new")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    for pattern in WARM_START if self.start else ():
      for path in self.start.glob(pattern):
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        copy(path, made / path.name)
    record = {"flags": self.flags, "command": self.told}
    (made / COMMAND_FILE).write_text(json.dumps(record, indent=2) + "\n")
    os.replace(made, self.workdir)


class Job:
  """A run's process, from the lock on its log to its end."""

  def __init__(
    self, run: Run, environment: Mapping[str, str], cores: Collection[int] | None = None
  ):
    """Nothing is started yet.

    Args:
      run: to be made.
      environment: of the process.
      cores: that it may use; None: all.
    """
    run.log.parent.mkdir(parents=True, exist_ok=True)
    self.run, self.began = run, time.monotonic()
    self._environment = environment
    self.cores = cores
    self._log = open(run.log, "ab")
    self._process: subprocess.Popen | None = None

  def ended(self) -> bool:
    """Starts the process as soon as nobody else makes this run; True when it is over."""
    if self._process is None:
      try:
        fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:  # a process of an earlier comparison lives on
        return False
      if self.run.finished():
        return True
      self.run.prepare()
      self._process = subprocess.Popen(
        self.run.command, env=self._environment, stdout=self._log, stderr=self._log
      )
      if self.cores is not None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
          os.sched_setaffinity(self._process.pid, self.cores)
    return self._process.poll() is not None

  def terminate(self) -> None:
    """Tells the process to end; what it has not checkpointed is made again."""
    if self._process:
      self._process.terminate()

  def close(self) -> None:
    """Waits for the process, and lets its log go."""
    if self._process:
      try:
        self._process.wait(STOP_S)
      except subprocess.TimeoutExpired:
        self._process.kill()
        self._process.wait()
    self._log.close()


@dataclasses.dataclass
class Maker:
  """Makes runs, several at a time, and remembers how they ended."""

  jobs: int = 1
  environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))
  deadline: float = math.inf  # of time.monotonic: no run begins or goes on after it
  say: Callable[[str], None] = print
  asked: dict[pathlib.Path, Run] = dataclasses.field(default_factory=dict)
  failed: dict[pathlib.Path, Run] = dataclasses.field(default_factory=dict)

  @property
  def left(self) -> list[Run]:
    """Runs that were asked for, did not fail, and are not finished."""
    return [run for run in self.asked.values() if self._wanted(run)]

  def ready(self, runs: Sequence[Run]) -> list[Run]:
    """Those that can be made now: their warm starts are there."""
    started = lambda run: run.start is None or (run.start / REPORT_FILE).exists()
    open_now = time.monotonic() < self.deadline
    return [run for run in runs if open_now and started(run) and self._wanted(run)]

  def _wanted(self, run: Run) -> bool:
    return run.workdir not in self.failed and not run.finished()

  def make(self, runs: Sequence[Run], *, jobs: int | None = None) -> None:
    """Makes those that are ready and not there, and says how each ended.

    Args:
      runs: what there should be.
      jobs: processes at a time, if not as usual.

    Raises:
      UserError: before any begins, if a workdir holds another run.
    """
    for run in runs:
      run.check()
    self.asked |= {run.workdir: run for run in runs}
    waiting = self.ready(runs)
    total, ended = len(waiting), 0
    working: list[Job] = []
    free = shares(jobs or self.jobs)
    try:
      while (waiting or working) and time.monotonic() < self.deadline:
        while waiting and free:
          working.append(Job(waiting.pop(0), self.environment, free.pop()))
        for job in [job for job in working if job.ended()]:
          working.remove(job)
          job.close()
          free.append(job.cores)
          ended += 1
          self._note(job, f"[{ended}/{total}]")
        time.sleep(POLL_S if working else 0)
    finally:
      for job in working:
        job.terminate()
      for job in working:
        job.close()

  def _note(self, job: Job, count: str) -> None:
    how = f"{time.monotonic() - job.began:.0f} s"
    if not job.run.finished():
      self.failed[job.run.workdir] = job.run
      how = f"FAILED: {last_line(job.run.log)}"
    self.say(f"{count} {job.run.workdir}: {how}")


def shares(jobs: int) -> list[Collection[int] | None]:
  """The cores of each of several processes at a time.

  XLA has a thread a core that it may use, and the threads of two processes on the same cores wait
  for each other: of two runs on two cores an iteration takes a tenth less if each has its own.
  """
  if jobs == 1 or not hasattr(os, "sched_setaffinity"):  # which is Linux's
    return [None] * jobs
  cores = sorted(os.sched_getaffinity(0))
  return [cores[i % len(cores) :: jobs] for i in range(jobs)]


def last_line(log: pathlib.Path) -> str:
  """What a process said last."""
  lines = log.read_text(errors="replace").split("\n")
  return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
