"""A process of the grader pool: `python -m spo_jax.rewards.keeper FD GRADER SECONDS MEGABYTES`.

It imports the grader once and never runs it. A fork of it does, and is killed and forked anew, in
milliseconds, when it misses the deadline or dies. Neither ever imports JAX or has a second thread,
so forking is safe here, as it would not be in the process that trains.

Messages are JSON: a request is [response, answer], a reply is [reward, failure]; the first message
is "" when the grader is ready, or why it cannot be loaded.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

from spo_jax.rewards import registry

TIMED_OUT = "timed out"
DIED = "died"


class Child:
  """A fork of this process that grades."""

  def __init__(self, grader: registry.Grader, keeper: Connection, timeout_s: float, memory_mb: int):
    self._connection, remote = multiprocessing.Pipe()
    self._pid = os.fork()
    if self._pid == 0:
      try:
        keeper.close()
        self._connection.close()
        _serve(remote, grader, timeout_s, memory_mb)
      finally:
        os._exit(0)  # Whatever happens, the child must not run on as a second keeper.
    remote.close()

  def ask(self, request: bytes) -> bytes:
    """The child's reply; raises EOFError or OSError if it dies before."""
    self._connection.send_bytes(request)
    return self._connection.recv_bytes()

  def kill(self) -> None:
    """Ends the child, and what it may have started."""
    self._connection.close()
    os.kill(self._pid, signal.SIGKILL)
    # There is no such group if the child died too early; macOS refuses when only the child is left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self._pid, signal.SIGKILL)
    os.waitpid(self._pid, 0)


def _serve(connection: Connection, grader: registry.Grader, timeout_s: float, memory_mb: int):
  """Grades until the connection closes."""
  os.setpgid(0, 0)
  own = os.getpid()
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  limit = memory_mb * 2**20
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  # Parsers print what they think of a text; the keeper has no standard output in any case.
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
  with contextlib.suppress(EOFError, OSError):
    while True:
      response, answer = json.loads(connection.recv_bytes())
      # The keeper kills in time; the kernel does it if the keeper is gone.
      signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s)
      outcome = registry.attempt(grader, response, answer)
      if os.getpid() != own:
        return  # A fork that the grader made: its reply would be taken for the next response's.
      signal.setitimer(signal.ITIMER_REAL, 0)
      connection.send_bytes(json.dumps(outcome).encode())


def _raise_timeout(signum, frame):
  raise TimeoutError


def keep(connection: Connection, grader: str, timeout_s: float, memory_mb: int) -> None:
  """Answers requests until the connection closes."""
  signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit())
  signal.signal(signal.SIGALRM, _raise_timeout)
  try:
    function = registry.load(grader)
  except Exception as error:
    connection.send_bytes(f"{type(error).__name__}: {error}".encode())
    return
  gc.freeze()  # Pages that the collector does not touch stay shared with the children.
  connection.send_bytes(b"")
  child = None
  try:
    while True:
      request = connection.recv_bytes()
      child = child or Child(function, connection, timeout_s, memory_mb)
      failure = ""
      try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        reply = child.ask(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
      except TimeoutError:
        failure = TIMED_OUT
      except (EOFError, OSError):
        signal.setitimer(signal.ITIMER_REAL, 0)
        failure = DIED
      if failure:
        child.kill()
        child = None
        reply = json.dumps(registry.Outcome(0.0, failure)).encode()
      connection.send_bytes(reply)
  except (EOFError, OSError):  # The pool has closed, and asks for an end that has come already.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
  finally:
    if child is not None:
      child.kill()


if __name__ == "__main__":
  fd, grader, timeout_s, memory_mb = sys.argv[1:]
  try:
    keep(Connection(int(fd)), grader, float(timeout_s), int(memory_mb))
  finally:
    # Nothing is left to end in order, and an exception in an interpreter that ends is printed.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
