"""Graders in processes of their own, with a deadline and a memory limit for each response.

A text that a model wrote can make a grader hang, exhaust memory or crash. Here that costs the
response its reward and the batch a deadline, nothing else. See `keeper.py` for the other side.
"""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import connection

from spo_jax.errors import UserError
from spo_jax.rewards import registry

START_S = 120.0  # until a keeper has imported its grader, on the slowest of machines
END_S = 5.0  # until a keeper that is told to end has ended
# A keeper answers within the deadline, plus the forking of a child; twice that and this is broken.
SPARE_S = 10.0
KEEPER_DIED = "keeper died"


class Keeper:
  """A keeper process, from the side of who asks."""

  def __init__(self, grader: str, timeout_s: float, memory_mb: int):
    self.connection, remote = multiprocessing.Pipe()
    arguments = [str(remote.fileno()), grader, str(timeout_s), str(memory_mb)]
    with remote:
      # A process made from scratch: forking one that has JAX's threads can deadlock. In a session
      # of its own, so that an interrupt reaches the training process alone.
      self._process = subprocess.Popen(
        [sys.executable, "-m", "spo_jax.rewards.keeper", *arguments],
        pass_fds=[remote.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        # A grader is found where it is found here; one thread, so that the keeper can fork.
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
      )
    self._grader = grader
    self._ready = False

  def ask(self, response: str, answer: str) -> None:
    """Sends a response to grade.

    Raises:
      UserError: if the grader cannot be loaded.
    """
    if not self._ready:
      self.wait_ready()
    # The reply tells if the keeper is dead.
    with contextlib.suppress(OSError):
      self.connection.send_bytes(json.dumps([response, answer]).encode())

  def wait_ready(self) -> None:
    """Waits until the grader is imported; raises UserError if it cannot be."""
    problem = f"no answer in {START_S:.0f} s"
    if self.connection.poll(START_S):
      try:
        problem = self.connection.recv_bytes().decode()
      except (EOFError, OSError):
        problem = "its process ended"
    if problem:
      raise UserError(f"grader '{self._grader}' cannot be loaded: {problem}")
    self._ready = True

  def reply(self) -> registry.Outcome:
    """The outcome of what was asked."""
    try:
      return registry.Outcome(*json.loads(self.connection.recv_bytes()))
    except (EOFError, OSError):
      return registry.Outcome(0.0, KEEPER_DIED)

  def close(self) -> None:
    """Ends the process."""
    self.connection.close()
    self._process.terminate()
    try:
      self._process.wait(END_S)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()


class GraderPool:
  """Grades batches in processes that start when first needed and are reused.

  Args:
    grader: MODULE:FUNCTION, a function (response, answer) -> reward.
    workers: most processes that grade at a time.
    timeout_s: seconds a response; a batch takes at most about (bad responses / workers + 1) times
      that longer than it would without the bad ones.
    memory_mb: address space of a process that grades.
  """

  def __init__(self, grader: str, *, workers: int, timeout_s: float, memory_mb: int):
    self._new_keeper = lambda: Keeper(grader, timeout_s, memory_mb)
    self._workers = workers
    self._patience_s = 2 * timeout_s + SPARE_S
    self._keepers: list[Keeper] = []
    self._grading = threading.Lock()

  def check(self) -> None:
    """Starts one process; raises UserError if the grader cannot be loaded there."""
    self._start(1)
    try:
      self._keepers[0].wait_ready()
    except BaseException:
      self.close()
      raise

  def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[registry.Outcome]:
    """Outcomes of R responses, in their order. Threads take turns.

    Raises:
      UserError: if the grader cannot be loaded.
    """
    with self._grading:
      return self._grade(responses, answers)

  def _grade(self, responses, answers) -> list[registry.Outcome]:
    outcomes = [registry.Outcome(0.0, KEEPER_DIED)] * len(responses)
    waiting = iter(range(len(responses)))
    busy: dict[connection.Connection, tuple[Keeper, int]] = {}

    def assign(keeper: Keeper) -> None:
      position = next(waiting, None)
      if position is not None:
        keeper.ask(responses[position], answers[position])
        busy[keeper.connection] = keeper, position

    try:
      self._start(min(self._workers, len(responses)))
      for keeper in self._keepers:
        assign(keeper)
      while busy:
        # Keepers never hang; if all are silent for so long, somebody has stopped them.
        heard = connection.wait(list(busy), self._patience_s)
        for channel in heard or list(busy):
          keeper, position = busy.pop(channel)
          if heard:
            outcomes[position] = keeper.reply()
          if outcomes[position].failure == KEEPER_DIED:
            keeper = self._replace(keeper)
          assign(keeper)
    except BaseException:
      self.close()  # What is under way must not be taken for the next batch's.
      raise
    return outcomes

  def close(self) -> None:
    """Ends the processes; they start again if the pool is used again."""
    while self._keepers:
      self._keepers.pop().close()

  def _start(self, number: int) -> None:
    while len(self._keepers) < number:
      self._keepers.append(self._new_keeper())

  def _replace(self, keeper: Keeper) -> Keeper:
    keeper.close()
    place = self._keepers.index(keeper)
    self._keepers[place] = self._new_keeper()
    return self._keepers[place]
