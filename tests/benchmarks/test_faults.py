"""The faults' command: files are damaged as it says, ends are judged, the reward server answers."""

import subprocess

import pytest

from benchmarks import faults, reward_server
from benchmarks.run_processes import free_port
from spo_jax.errors import UserError
from tests.benchmarks.test_meshes import make_run


@pytest.mark.parametrize(
  ("how", "left"), [("cut", b"abc"), ("zeroed", bytes(6)), ("removed", None)]
)
def test_damages(tmp_path, how, left):
  path = tmp_path / "file"
  path.write_bytes(b"abcdef")
  faults.DAMAGES[how](path)
  assert (path.read_bytes() if path.exists() else None) == left


def test_another_status_is_told_with_the_last_line():
  ended = faults.Ended(1, 2.0, ["first", "last"])
  assert faults.expect(ended, 1) is ended
  with pytest.raises(UserError, match=r"status 1 in place of 2; it told, last: last"):
    faults.expect(ended, 2)


@pytest.mark.parametrize(
  ("change", "message"),
  [({}, None), ({"loss": 0.6}, "differs in iteration 0"), ({"iterations": 1}, "1 lines")],
)
def test_runs_are_compared(tmp_path, change, message):
  make_run(tmp_path / "whole")
  make_run(tmp_path / "run", **change)
  paths = tmp_path / "run", tmp_path / "whole"
  if message is None:
    faults.expect_same(*paths)
  else:
    with pytest.raises(UserError, match=message):
      faults.expect_same(*paths)


def test_what_cannot_be_mounted_is_told(tmp_path, monkeypatch):
  refused = subprocess.CompletedProcess([], 32, stderr="mount: must be superuser\n")
  monkeypatch.setattr(faults.subprocess, "run", lambda *_, **__: refused)
  with (
    pytest.raises(UserError, match=r"cannot be mounted: mount: must be superuser \(leave"),
    faults.mounted(tmp_path / "disk", "ro"),
  ):
    pass


def test_the_server_grades_until_it_is_killed(monkeypatch):
  port = free_port()
  monkeypatch.setenv(reward_server.PORT, str(port))
  with faults.reward_server(port):
    assert reward_server.ask("a 1 & b = é", "2") == 1.0
    assert reward_server.ask("", "2") == 0.0
  with pytest.raises(OSError):
    reward_server.ask("1", "2")
