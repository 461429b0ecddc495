"""The soak tells runs that are the same from those that are not, and processes that do not end."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import run_processes, soak
from spo_jax.errors import UserError


def make_run(folder, loss=0.5, weight=1.0, seconds=1.0, iterations=3):
  (folder / "model").mkdir(parents=True)
  rows = [
    {"iteration": i, "train/loss": loss * i, "time/elapsed_s": seconds * i, "speed/mfu": seconds}
    for i in range(iterations)
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  save_file({"w": np.full(3, weight, np.float32)}, folder / "model" / "model.safetensors")
  return folder


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seconds": 2.0}, None),
    ({"loss": 0.5 + 1e-7}, "iteration 1 differs"),
    ({"weight": 1 + 1e-6}, "the parameters w differ"),
  ],
)
def test_runs_are_the_same_but_for_seconds(tmp_path, change, message):
  runs = make_run(tmp_path / "whole"), make_run(tmp_path / "killed", **change)
  if message is None:
    soak.same(*runs)
  else:
    with pytest.raises(UserError, match=message):
      soak.same(*runs)


def test_a_run_that_lacks_an_iteration_is_another(tmp_path):
  runs = make_run(tmp_path / "whole"), make_run(tmp_path / "killed", iterations=2)
  with pytest.raises(ValueError, match="shorter"):
    soak.same(*runs)


def test_a_process_that_does_not_end_is_killed_and_told():
  sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
  ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
  ended.wait()
  with pytest.raises(UserError, match="went on for 0 s"):
    run_processes.wait_all([sleeper, ended], 0.2)
  assert sleeper.wait() < 0
  assert run_processes.wait_all([ended], 5)[0] == [3]


def test_fields_of_the_config_are_told_from_mistakes(capsys):
  args, fields = soak.parse_args(["--folder=x", "--kills=3", "--config.iterations=4"])
  assert args.kills == 3 and fields == ["--config.iterations=4"]
  with pytest.raises(SystemExit):
    soak.parse_args(["--folder=x", "--kils=3"])
  assert "unknown argument --kils=3" in capsys.readouterr().err
