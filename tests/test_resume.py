"""A run that is killed and started again is, bit for bit, the run that was not."""

import signal
import time

import pytest

from benchmarks.run_processes import SIGNAL, metrics_without_timings
from tests import tiny_run

FIELDS = SIGNAL | {"rollout__branches": (2, 2), "rollout__segment_tokens": (6,)}


def finish(workdir):
  process = tiny_run.start("spo_tree.py", workdir, **FIELDS)
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors


def kill_when(workdir, reached):
  """Starts the run and kills it as soon as `reached()`; False if it ended before."""
  process = tiny_run.start("spo_tree.py", workdir, **FIELDS)
  try:
    while process.poll() is None:
      if reached():
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
      time.sleep(0.002)
    return False
  finally:
    process.kill()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  finish(workdir)
  return metrics_without_timings(workdir)


def test_killed_in_warm_start_and_later(uninterrupted, tmp_path):
  metrics = tmp_path / "metrics.jsonl"

  def lines():
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

  warm_start_saved = lambda: any((tmp_path / "warm_start").glob("2*"))
  rolling_out_or_writing = lambda: lines() >= 3
  assert kill_when(tmp_path, warm_start_saved)
  assert kill_when(tmp_path, rolling_out_or_writing)
  finish(tmp_path)
  assert metrics_without_timings(tmp_path) == uninterrupted
  assert len(uninterrupted) == 5
  skipped = [line["train/skipped"] for line in uninterrupted[1:]]
  assert sum(skipped) < len(skipped)  # else there would be nothing to lose but random numbers
