"""Processes: done already, gone on with, failed, stopped, alive from before."""

import json
import os
import sys
import textwrap
import time

import pytest

from benchmarks.comparison import runs
from benchmarks.comparison.runs import Maker, Run
from spo_jax.errors import UserError

# Stands in for training: writes metrics as far as the field `reach` says, then ends or sleeps.
PROGRAM = """
import json, os, pathlib, sys, time
flags = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
workdir, last = pathlib.Path(flags["workdir"]), int(flags["config.iterations"])
with open(workdir / "begun", "a") as file:
  file.write("x")
if flags["config"] == "bad":
  print("spo_jax: it went wrong")
  sys.exit(2)
again = len((workdir / "begun").read_text()) > 1
if flags["config"] == "slow" or flags["config"] == "slow at first" and not again:
  time.sleep(60)
if flags["config"] == "late":
  time.sleep(1)
if flags["config"] == "cores":
  time.sleep(0.1)
  (workdir / "cores").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
(workdir / "metrics.jsonl").write_text(json.dumps({"iteration": last}) + "\\n")
(workdir / "report.html").touch()
"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
  path = tmp_path / "program.py"
  path.write_text(textwrap.dedent(PROGRAM))
  command = lambda run: [sys.executable, str(path), f"--workdir={run.workdir}", *run.flags]
  monkeypatch.setattr(Run, "command", property(command))
  monkeypatch.setattr(runs, "POLL_S", 0.01)


def begun(run: Run) -> int:
  path = run.workdir / "begun"
  return len(path.read_text()) if path.exists() else 0


def test_finished_runs_are_not_made_again_and_failures_do_not_stop_the_others(tmp_path):
  good = [Run(tmp_path / "runs" / f"good{i}", "good", {"iterations": 3}) for i in range(3)]
  bad = Run(tmp_path / "runs" / "bad", "bad", {"iterations": 3})
  said = []
  maker = Maker(jobs=2, say=said.append)
  maker.make([bad, *good])
  assert [run.finished() for run in good] == [True] * 3
  assert list(maker.failed.values()) == [bad] and maker.left == []
  assert any("FAILED: spo_jax: it went wrong" in line for line in said)
  maker.make([bad, *good])
  assert [begun(run) for run in [bad, *good]] == [1, 1, 1, 1]
  Maker(say=said.append).make([bad, *good])  # another call tries again what failed
  assert [begun(run) for run in [bad, *good]] == [2, 1, 1, 1]


@pytest.mark.parametrize(
  ("jobs", "found"),
  [(1, [None]), (2, [[2, 5, 7], [3, 6]]), (6, [[2], [3], [5], [6], [7], [2]])],
)
def test_runs_at_a_time_share_the_cores(monkeypatch, jobs, found):
  monkeypatch.setattr(runs.os, "sched_getaffinity", lambda _: {7, 3, 2, 6, 5}, raising=False)
  monkeypatch.setattr(runs.os, "sched_setaffinity", None, raising=False)
  assert runs.shares(jobs) == found


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot tie processes")
def test_a_run_keeps_to_its_cores(tmp_path, monkeypatch):
  core = max(os.sched_getaffinity(0))
  monkeypatch.setattr(runs, "shares", lambda jobs: [[core]] * jobs)
  made = [Run(tmp_path / f"run{i}", "cores", {"iterations": 3}) for i in range(3)]
  Maker(jobs=2, say=lambda _: None).make(made)
  assert [json.loads((run.workdir / "cores").read_text()) for run in made] == [[core]] * 3


def test_a_report_of_an_unfinished_run_is_no_end(tmp_path):
  run = Run(tmp_path / "run", "good", {"iterations": 3})
  run.prepare()
  (run.workdir / "report.html").touch()
  assert not run.finished()
  (run.workdir / "metrics.jsonl").write_text('{"iteration": 2}\n')
  assert not run.finished()
  (run.workdir / "metrics.jsonl").write_text('{"iteration": 3}\n')
  assert run.finished()


def test_the_deadline_stops_what_runs_and_begins_nothing(tmp_path):
  slow = [Run(tmp_path / f"slow{i}", "slow", {"iterations": 3}) for i in range(2)]
  began = time.monotonic()
  maker = Maker(deadline=began + 0.5, say=lambda _: None)
  maker.make(slow)
  assert time.monotonic() - began < 20
  assert maker.left == slow and not maker.failed
  assert begun(slow[1]) == 0 and maker.ready(slow) == []


def test_a_run_takes_over_the_warm_start_and_waits_for_it(tmp_path):
  start = Run(tmp_path / "start", "good", {"iterations": 1})
  run = Run(tmp_path / "run", "good", {"iterations": 3}, start.workdir)
  maker = Maker(say=lambda _: None)
  maker.make([run])
  assert not run.workdir.exists() and maker.left == [run]
  maker.make([start])
  for name in ("warm_start/40", "data", "checkpoints", "some-tokenizer-1"):
    (start.workdir / name).mkdir(parents=True)
  for name in ("warm_start/40/arrays", "warm_start.jsonl", "config.json"):
    (start.workdir / name).write_text(name)
  maker.make([run])
  assert run.finished()
  assert (run.workdir / "warm_start/40/arrays").read_text() == "warm_start/40/arrays"
  assert (run.workdir / "warm_start.jsonl").exists() and (run.workdir / "data").exists()
  assert (run.workdir / "some-tokenizer-1").exists()
  assert not (run.workdir / "checkpoints").exists()
  assert not (run.workdir / "config.json").exists()


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
  run = Run(tmp_path / "run", "good", {"iterations": 3})
  Maker(say=lambda _: None).make([run])
  recorded = json.loads((run.workdir / "command.json").read_text())
  assert recorded["flags"] == ["--config=good", "--config.iterations=3"]
  other = Run(tmp_path / "run", "good", {"iterations": 2})
  with pytest.raises(UserError, match=r"other settings.*iterations=2"):
    Maker(say=lambda _: None).make([other])


def test_a_process_that_outlived_its_comparison_is_waited_for(tmp_path):
  run = Run(tmp_path / "run", "late", {"iterations": 3})
  orphan = runs.Job(run, None)
  assert not orphan.ended()
  orphan._log.close()  # as if the comparison had been killed: the lock is the process's alone
  maker = Maker(say=lambda _: None)
  maker.make([run])
  assert run.finished() and begun(run) == 1 and not maker.failed
  orphan._process.wait()


def test_a_killed_process_is_begun_again(tmp_path):
  run = Run(tmp_path / "run", "slow at first", {"iterations": 3})
  job = runs.Job(run, None)
  while not begun(run):
    assert not job.ended()
    time.sleep(0.01)
  job._process.kill()
  job.close()
  maker = Maker(say=lambda _: None)
  maker.make([run])
  assert run.finished() and begun(run) == 2 and not maker.failed
