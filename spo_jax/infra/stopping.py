"""SIGTERM: a machine that will be taken away asks the run to save and end."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

# Exit status of a run that saved and ended because it was asked to: the same command resumes it.
# EX_TEMPFAIL of sysexits.h, so that launchers can tell it from a mistake (2) and from a crash.
STOPPED_STATUS = 75
# Share of the grace period after which the run ends without saving again.
GIVE_UP_SHARE = 0.9

_asked = threading.Event()


def asked() -> bool:
  """Whether the process was asked to end."""
  return _asked.is_set()


@contextlib.contextmanager
def on_sigterm(grace_s: float) -> Iterator[None]:
  """Within the block SIGTERM asks the run to end, which it does between two iterations.

  If it has not ended when most of the grace period is over, because an iteration takes longer, the
  process exits at once: what was saved before is whole, and the run resumes from there.

  Args:
    grace_s: seconds from SIGTERM to the SIGKILL that follows it.
  """

  def give_up() -> None:
    line = "spo_jax: no time to save once more: the same command resumes from the last checkpoint"
    print(line, file=sys.stderr, flush=True)
    os._exit(STOPPED_STATUS)

  def ask(*_) -> None:
    if not _asked.is_set():
      _asked.set()
      timer.start()

  timer = threading.Timer(GIVE_UP_SHARE * grace_s, give_up)
  timer.daemon = True
  before = signal.signal(signal.SIGTERM, ask)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
    timer.cancel()
    _asked.clear()
