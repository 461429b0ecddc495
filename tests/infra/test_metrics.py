"""The record of a run survives a kill, a resume and a NaN; the display writes whole lines."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from spo_jax.errors import UserError
from spo_jax.infra.metrics import MetricWriter, append_line, read_lines, read_metrics
from spo_jax.infra.progress import Progress, clock, compact
from spo_jax.infra.sinks import TensorBoard


def line(iteration: int, **more) -> dict:
  return {"iteration": iteration, "train/loss": 0.1 * iteration, **more}


def content(workdir) -> bytes:
  return (workdir / "metrics.jsonl").read_bytes()


def events(workdir) -> list[tuple[int, float]]:
  """(step, loss) as TensorBoard would show them: a later process purges what it makes anew."""
  from tensorboard.backend.event_processing import event_accumulator

  accumulator = event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
  accumulator.Reload()
  return [(event.step, event.value) for event in accumulator.Scalars("train/loss")]


def test_lines_are_valid_json_in_order(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write({"iteration": 3, "b": 0.1, "a": np.float32(0.5), "n": np.int64(7), "t": True})
  text = content(tmp_path).decode()
  assert text == '{"iteration": 3, "b": 0.1, "a": 0.5, "n": 7, "t": 1}\n'
  assert read_metrics(tmp_path) == [{"iteration": 3, "b": 0.1, "a": 0.5, "n": 7, "t": 1}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), None])
def test_what_json_cannot_hold_becomes_null(tmp_path, value):
  with MetricWriter(tmp_path) as writer:
    writer.write({"iteration": 1, "train/loss": value})

  def refuse(name):
    raise AssertionError(name)

  row = json.loads(content(tmp_path), parse_constant=refuse)
  assert row == {"iteration": 1, "train/loss": None}


def test_each_line_is_there_at_once(tmp_path):
  writer = MetricWriter(tmp_path)
  for i in range(3):
    writer.write(line(i))
    assert len(read_metrics(tmp_path)) == i + 1
  writer.close()


def test_lines_survive_a_kill(tmp_path):
  program = (
    "import sys, time\nfrom spo_jax.infra.metrics import MetricWriter\n"
    "writer = MetricWriter(sys.argv[1])\nwriter.write({'iteration': 1, 'x': 2})\n"
    "print('written', flush=True)\ntime.sleep(60)"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "written\n"
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  process.stdout.close()
  assert read_metrics(tmp_path) == [{"iteration": 1, "x": 2}]


def test_restore_cuts_exactly(tmp_path):
  with MetricWriter(tmp_path, [TensorBoard(tmp_path)]) as writer:
    for i in range(3):
      writer.write(line(i))
    position, kept = json.loads(json.dumps(writer.position())), content(tmp_path)
    assert position["bytes"] == len(kept)
    for i in range(3, 6):
      writer.write(line(i, later=1))
  with open(tmp_path / "metrics.jsonl", "ab") as file:
    file.write(b'{"iteration": 6, "tr')

  with MetricWriter(tmp_path, [TensorBoard(tmp_path)]) as writer:
    writer.restore(position)
    assert content(tmp_path) == kept
    assert writer.position() == position
    writer.write({"iteration": 3, "train/loss": 33.0})
  assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]
  assert events(tmp_path) == [(i, pytest.approx(v)) for i, v in enumerate((0, 0.1, 0.2, 33.0))]


def test_restore_to_the_start(tmp_path):
  with MetricWriter(tmp_path, [TensorBoard(tmp_path)]) as writer:
    start = writer.position()
    writer.write({"iteration": 0, "train/loss": 5.0})
    writer.restore(start)
    assert content(tmp_path) == b""
    writer.write(line(0))
  assert read_metrics(tmp_path) == [line(0)]
  assert events(tmp_path) == [(0, 0.0)]


def test_a_record_that_is_gone_is_written_again(tmp_path):
  with MetricWriter(tmp_path / "old") as writer:
    for i in range(3):
      writer.write(line(i))
    position = json.loads(json.dumps(writer.position()))
    writer.write(line(3))
  with MetricWriter(tmp_path / "new") as writer:
    writer.restore(position)
    assert writer.position() == position
    writer.write(line(3, later=1))
  assert read_metrics(tmp_path / "new") == [*map(line, range(3)), line(3, later=1)]


def test_restore_detects_tampering(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(line(0))
    writer.write(line(1))
    position = writer.position()
    writer.write(line(2))
  before = content(tmp_path)
  changed = before.replace(b'"iteration": 1', b'"iteration": 7')
  (tmp_path / "metrics.jsonl").write_bytes(changed)
  with MetricWriter(tmp_path) as writer, pytest.raises(UserError, match="not the file") as caught:
    writer.restore(position)
  assert "\n" not in str(caught.value)
  assert content(tmp_path) == changed

  (tmp_path / "metrics.jsonl").write_bytes(before[: position["bytes"] - 5])
  with MetricWriter(tmp_path) as writer, pytest.raises(UserError, match=r"has \d+ bytes"):
    writer.restore(position)


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"iteration": 0}\n{"iterat')
  assert read_metrics(tmp_path) == [{"iteration": 0}]
  with MetricWriter(tmp_path) as writer:
    writer.write(line(1))
  assert read_metrics(tmp_path) == [{"iteration": 0}, line(1)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"iteration": 0}\n{"iterat\n{"iteration": 2}\n')
  with pytest.raises(UserError, match="line 2"):
    read_metrics(tmp_path)


def test_append_line(tmp_path):
  path = tmp_path / "warm_start.jsonl"
  assert read_lines(path) == []
  append_line(path, {"step": 0, "loss": 1.5})
  append_line(path, {"step": 1, "loss": math.nan})
  assert read_lines(path) == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": None}]


FULL = {
  "iteration": 12,
  "train/reward_mean": 0.314,
  "train/loss": -0.0123,
  "train/kl": 0.0004,
  "train/clip_fraction": 0.02,
  "train/grad_norm": 0.31,
  "train/segments": 812,
  "tokens/sampled": 1_230_000,
  "tokens/trained": 912_345,
  "time/elapsed_s": 72.4,
  "time/rollout_s": 0.412,
  "time/update_s": 0.22,
  "eval/accuracy": 0.28,
  "eval/accuracy_greedy": 0.45,
}


class Terminal(io.StringIO):
  """A stream that says it is a terminal."""

  def isatty(self):
    return True


def test_summary_is_one_plain_line_where_there_is_no_terminal():
  stream = io.StringIO()
  with Progress(200, stream) as progress:
    with progress.bar("rollout", total=3) as advance:
      advance(3, tokens=12)
    progress.summary(FULL)
    progress.note("[bold] saved")
  assert stream.getvalue() == (
    "iter  12/200  reward  0.31  acc 0.28/0.45  loss -0.0123  kl 0.0004  clip 0.02  gnorm 0.31"
    "  segs  812  sampled   1.2M  trained 912.3k  roll 0.41s  upd 0.22s  elapsed 01:12\n"
    "[bold] saved\n"
  )


def test_summary_of_an_evaluation_and_of_nan():
  stream = io.StringIO()
  progress = Progress(5, stream)
  progress.summary({"iteration": 0, "eval/accuracy": 0.1, "time/elapsed_s": 3723})
  progress.summary({"iteration": 1, "train/loss": None, "train/kl": math.nan})
  first, second = stream.getvalue().splitlines()
  assert first == "iter 0/5  acc      0.10  elapsed 1:02:03"
  assert second == "iter 1/5  acc         -  loss     nan  kl    nan"


def test_a_narrow_terminal_gets_one_line(monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  monkeypatch.setenv("TERM", "xterm")
  stream = Terminal()
  Progress(200, stream).summary(FULL)
  (shown,) = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
  assert len(shown) < 80 and "reward" in shown and "elapsed" in shown and "upd" not in shown


def test_bars_leave_nothing_and_cost_little(monkeypatch):
  monkeypatch.setenv("COLUMNS", "200")
  monkeypatch.setenv("TERM", "xterm")
  stream = Terminal()
  costs = []
  with Progress(20, stream) as progress:
    for i in range(20):
      start = time.perf_counter()
      for label in ("rollout", "update", "evaluate"):
        with progress.bar(label, total=10) as advance:
          for _ in range(10):
            advance(loss=0.5)
      progress.summary({**FULL, "iteration": i})
      costs.append(time.perf_counter() - start)
    with progress.bar("outer", total=2), progress.bar("inner", total=None) as advance:
      advance(2, loss=0.25)
      progress._live.refresh()
      assert "outer" in stream.getvalue() and "loss 0.25" in stream.getvalue()
    with pytest.raises(KeyError), progress.bar("fails", total=2):
      raise KeyError
    assert not progress._bars
  assert min(costs) < 0.005
  assert sum(text.count("reward") for text in stream.getvalue().splitlines()) == 20


@pytest.mark.parametrize(
  "number,text", [(0, "0"), (812, "812"), (9_400, "9.4k"), (999_999, "1.0M"), (3.1e9, "3.1B")]
)
def test_compact(number, text):
  assert compact(number) == text


def test_clock():
  assert [clock(s) for s in (0, 72.9, 3599, 7384)] == ["00:00", "01:12", "59:59", "2:03:04"]
