"""SIGTERM is noted, and a process that has no time to end by itself ends in time."""

import os
import signal
import subprocess
import sys

from spo_jax.infra import stopping
from tests import tiny_run


def test_sigterm_is_noted_within_the_block_alone():
  before = signal.getsignal(signal.SIGTERM)
  with stopping.on_sigterm(60):
    assert not stopping.asked()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
    assert stopping.asked()
  assert not stopping.asked() and signal.getsignal(signal.SIGTERM) is before


def test_what_does_not_end_in_time_is_ended():
  program = (
    "import os, signal, time\nfrom spo_jax.infra import stopping\n"
    "with stopping.on_sigterm(0.5):\n  os.kill(os.getpid(), signal.SIGTERM)\n  time.sleep(60)"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=tiny_run.REPOSITORY,
    capture_output=True,
    text=True,
    timeout=30,
    check=False,
  )
  assert done.returncode == stopping.STOPPED_STATUS
  assert "no time to save once more" in done.stderr
