"""The command line: a user's mistake prints one clear line and exits with 2, before training."""

import json
import shutil
import subprocess

import pytest

from spo_jax.command_line import USER_ERROR_STATUS, config_name, difference
from tests import tiny_run

CONFIG = "spo_tree.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Workdir of a run of two iterations."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  process = tiny_run.start(CONFIG, workdir, iterations=2)
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  return workdir


def truncate_arrays(workdir):
  """Cuts the largest file of the newest checkpoint in half."""
  files = [p for p in (workdir / "checkpoints" / "2").rglob("*") if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  with open(largest, "r+b") as file:
    file.truncate(largest.stat().st_size // 2)


def test_every_mistake_is_one_line_and_exit_status_2(finished, tmp_path):
  truncated = tmp_path / "truncated"
  shutil.copytree(finished, truncated)
  truncate_arrays(truncated)
  tampered = tmp_path / "tampered"
  shutil.copytree(finished, tampered)
  (tampered / "metrics.jsonl").write_text("{}\n")
  new = tmp_path / "new"
  cases = {
    "config has no field 'iteratons', did you mean 'iterations'?": (CONFIG, new, {"iteratons": 3}),
    "config.loss has no field 'epsilonlow'": (CONFIG, new, {"loss__epsilonlow": 3}),
    "unknown variant 'fillers' of this config, one of: arithmetic, filler": (
      f"{CONFIG}:fillers",
      new,
      {},
    ),
    "there is no config file 'configs/none.py'": ("none.py", new, {}),
    "config.rollout.prompts is 0": (CONFIG, new, {"rollout__prompts": 0}),
    "flag --config.iterations=many": (CONFIG, new, {"iterations": "many"}),
    "holds a run with another config (seed differs)": (CONFIG, finished, {"seed": 7}),
    "split 'train[:0]' of data set 'arithmetic/plain' is empty": (
      CONFIG,
      tmp_path / "empty",
      {"eval__split": "train[:0]"},
    ),
    "needs 3 devices, there are 1": (CONFIG, tmp_path / "mesh", {"mesh__data": 3}),
    "checkpoints/2 cannot be read": (CONFIG, truncated, {}),
    "metrics.jsonl has 3 bytes but the checkpoint was made at": (CONFIG, tampered, {}),
  }
  processes = {
    message: tiny_run.start(config, workdir, **{"iterations": 2, **fields})
    for message, (config, workdir, fields) in cases.items()
  }
  for message, process in processes.items():
    _, errors = process.communicate(timeout=300)
    assert process.returncode == USER_ERROR_STATUS, errors
    *warnings, last = errors.strip().splitlines()
    assert last.startswith("spo_jax: ") and message in last, errors
    assert not any("Traceback" in line for line in warnings), errors


def test_a_batch_that_the_mesh_cannot_divide(tmp_path):
  environment = tiny_run.environment() | {"JAX_NUM_CPU_DEVICES": "8"}
  command = tiny_run.command(CONFIG, tmp_path, mesh__data=4, rollout__prompts=6)
  result = subprocess.run(
    command, cwd=tiny_run.REPOSITORY, env=environment, capture_output=True, text=True, check=False
  )
  assert result.returncode == USER_ERROR_STATUS
  line = "config.rollout.prompts 6 cannot be divided over the mesh, whose data x fsdp axes are 4"
  assert line in result.stderr


def test_config_json_tells_file_and_fields(finished):
  config = json.loads((finished / "config.json").read_text())
  assert config["config_file"] == "configs/spo_tree.py"
  assert config["rollout"]["prompts"] == tiny_run.TINY["rollout.prompts"]


def test_config_name():
  assert config_name(["main", "--config=a.py:b", "--workdir=w"]) == "a.py:b"
  assert config_name(["main", "--config", "a.py"]) == "a.py"
  assert config_name(["main", "--workdir=w"]) == ""


def test_difference():
  old = {"a": 1, "b": {"c": [1, 2], "d": 3}, "e": 4}
  assert difference(old, old) == []
  assert difference(old, {"a": 1, "b": {"c": [1, 3], "d": 3}, "f": 5}) == ["b.c", "f", "e"]
