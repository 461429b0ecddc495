"""A grader whose process is told to end once more while it ends."""

import atexit
import os
import signal

atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))


def grade(response: str, answer: str) -> float:
  """1.0 if they are equal."""
  return float(response == answer)
