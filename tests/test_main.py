"""The command line: a user's mistake prints one clear line and exits with 2, before training."""

import errno
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from absl.testing import flagsaver

from spo_jax import command_line, main
from spo_jax.command_line import difference
from spo_jax.config import Config
from spo_jax.errors import USER_ERROR_STATUS, UserError
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
  """Cuts what the newest checkpoint has of arrays in half."""
  files = list((workdir / "checkpoints" / "2" / "arrays").rglob("d/*"))
  assert files
  for path in files:
    os.truncate(path, path.stat().st_size // 2)


def told_of(errors):
  """The last line of what a command told, which has no traceback."""
  *warnings, last = errors.strip().splitlines()
  assert last.startswith("spo_jax: "), errors
  assert not any("Traceback" in line for line in warnings), errors
  return last


@pytest.mark.parametrize(
  ("config", "fields", "message"),
  [
    (CONFIG, {"iteratons": 3}, "config has no field 'iteratons', did you mean 'iterations'?"),
    (CONFIG, {"loss__epsilonlow": 3}, "config.loss has no field 'epsilonlow'"),
    (f"{CONFIG}:fillers", {}, "unknown variant 'fillers' of this config, one of: arithmetic, fill"),
    ("none.py", {}, "there is no config file 'configs/none.py'"),
    (CONFIG, {"rollout__prompts": 0}, "config.rollout.prompts is 0"),
    (CONFIG, {"iterations": "many"}, "flag --config.iterations=many"),
  ],
)
def test_a_config_that_is_wrong_is_told_at_once(
  config, fields, message, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tiny_run.REPOSITORY)
  words = tiny_run.command(config, tmp_path / "new", **fields)[2:]
  with flagsaver.flagsaver():
    status = command_line.run_command(words, Config, main.train_from_flags)
  assert status == USER_ERROR_STATUS
  assert message in told_of(capsys.readouterr().err)
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", ["3,5", "0", "3,", "1-2", "two"])
def test_a_profile_that_cannot_be_is_told_at_once(words, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tiny_run.REPOSITORY)
  command = [*tiny_run.command(CONFIG, tmp_path / "new", iterations=4)[2:], f"--profile={words}"]
  with flagsaver.flagsaver():
    status = command_line.run_command(command, Config, main.train_from_flags)
  assert status == USER_ERROR_STATUS
  assert f"--profile={words} must name iterations from 1 to 4" in told_of(capsys.readouterr().err)
  assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module", autouse=True)
def flags_of_libraries():
  """Defines them: those that are defined while flags are saved are forgotten after it."""
  for module in ("array_record.python.array_record_data_source", "grain.python"):
    importlib.import_module(module)


def tamper(workdir):
  (workdir / "metrics.jsonl").write_text("{}\n")


def leave(workdir):
  """Does nothing."""


@pytest.mark.parametrize(
  ("spoil", "fields", "message"),
  [
    (leave, {"seed": 7}, "holds a run with another config (config.seed was 0 and is 7)"),
    (truncate_arrays, {}, "checkpoints/2 cannot be read"),
    (tamper, {}, "metrics.jsonl has 3 bytes but the checkpoint was made at"),
    (
      None,
      {"eval__split": "train[:0]"},
      "split 'train[:0]' of data set 'arithmetic/plain' is empty",
    ),
    (None, {"mesh__data": 16}, "needs 16 devices, there are 8"),
  ],
)
def test_every_mistake_is_one_line_and_exit_status_2(
  spoil, fields, message, finished, tmp_path, monkeypatch, capsys
):
  """In a finished run's workdir, spoiled or not, or in a new one."""
  monkeypatch.chdir(tiny_run.REPOSITORY)
  if spoil:
    spoil(shutil.copytree(finished, tmp_path / "run"))
  words = tiny_run.command(CONFIG, tmp_path / "run", **{"iterations": 2, **fields})[2:]
  with flagsaver.flagsaver():
    status = command_line.run_command(words, Config, main.train_from_flags)
  assert status == USER_ERROR_STATUS
  assert message in told_of(capsys.readouterr().err)


def test_a_full_disk_is_told_in_one_line(monkeypatch, capsys):
  def write():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/metrics.jsonl")

  monkeypatch.setattr(command_line, "parse_flags", lambda *_: None)
  assert command_line.run_command(["program"], Config, write) == USER_ERROR_STATUS
  line = told_of(capsys.readouterr().err)
  assert "runs/metrics.jsonl cannot be written: No space left on device" in line


def test_a_batch_that_the_mesh_cannot_divide(tmp_path):
  environment = tiny_run.environment(devices=8)
  command = tiny_run.command(CONFIG, tmp_path, mesh__data=4, rollout__prompts=6)
  result = subprocess.run(
    command, cwd=tiny_run.REPOSITORY, env=environment, capture_output=True, text=True, check=False
  )
  assert result.returncode == USER_ERROR_STATUS
  line = "config.rollout.prompts 6 cannot be divided over the mesh, whose data x fsdp x sequence"
  assert line in result.stderr


def test_config_json_tells_file_and_fields(finished):
  config = json.loads((finished / "config.json").read_text())
  assert config["config_file"] == "configs/spo_tree.py"
  assert config["rollout"]["prompts"] == tiny_run.TINY["rollout.prompts"]


def test_a_workdir_that_is_claimed_is_not_written_again(tmp_path):
  """Processes of one run claim it side by side, the first before the others."""
  claim = lambda iterations: command_line.claim_workdir(
    tmp_path, {"iterations": iterations}, results=(), may_change=["iterations"]
  )
  claim(2)
  file = (tmp_path / "config.json").stat().st_ino
  claim(2)
  assert (tmp_path / "config.json").stat().st_ino == file
  claim(3)
  assert json.loads((tmp_path / "config.json").read_text()) == {"iterations": 3}


def test_a_folder_without_results_belongs_to_no_config(tmp_path):
  claim = functools.partial(
    command_line.claim_workdir, tmp_path, results=("a",), may_change=["b.c", "d"]
  )
  claim({"b": {"c": 1, "e": 1}, "d": {"f": 1}})
  claim({"b": {"c": 2, "e": 2}, "d": {"f": 1}})  # after a mistake, before anything was done
  (tmp_path / "a").touch()
  claim({"b": {"c": 3, "e": 2}, "d": {"f": 3}})
  with pytest.raises(UserError, match=r"another config .config.b.e was 2 and is 3.: set it as it"):
    claim({"b": {"c": 3, "e": 3}, "d": {"f": 3}})
  (tmp_path / "config.json").write_text("[]")
  with pytest.raises(UserError, match="is no config of a run"):
    claim({"b": {}})


def test_two_runs_in_a_workdir_do_not_mix(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tiny_run.REPOSITORY)
  words = tiny_run.command(CONFIG, tmp_path)[2:]
  with command_line.sole_user(tmp_path), flagsaver.flagsaver():
    assert command_line.run_command(words, Config, main.train_from_flags) == USER_ERROR_STATUS
  assert "is in use by a run" in told_of(capsys.readouterr().err)
  assert not (tmp_path / "config.json").exists()  # it is the other's to write
  with command_line.sole_user(tmp_path):
    pass


FILE = "configs/spo_tree.py"


def parsed(*words):
  """(config, workdir, FILE:variant) of a command line."""
  with flagsaver.flagsaver():
    command_line.parse_flags(["program", *words], Config)
    config = command_line.CONFIG.value.to_dict()
    return config, command_line.WORKDIR.value, command_line.config_file()


def test_an_override_may_stand_anywhere():
  fields = ["--config.seed=3", "--config.restart", "--config.rollout.prompts", "16"]
  for words in (
    [f"--config={FILE}", *fields, "--workdir=w"],
    [*fields, "--workdir", "w", f"--config={FILE}"],
    ["-workdir", "w", *fields[:2], "--config", FILE, *fields[2:]],
  ):
    config, workdir, file = parsed(*words)
    assert (config["seed"], config["restart"], config["rollout"]["prompts"]) == (
      3,
      True,
      16,
    )
    assert (workdir, file) == ("w", FILE)


def test_a_value_stays_with_its_flag():
  config, workdir, file = parsed(
    "--workdir", "--config=x", "--config.seed", "-3", "--config.data.system", "--config.nope=1",
    f"--config={FILE}:filler",
  )  # fmt: skip
  assert (workdir, file) == ("--config=x", f"{FILE}:filler")
  assert (config["seed"], config["data"]["system"]) == (-3, "--config.nope=1")
  assert config["data"]["variant"] == "filler"


def test_the_last_of_two_values_counts():
  config, workdir, file = parsed(
    "--config=configs/none.py", "--workdir=v", "--config.rollout.branches=(3,3)", "--config.seed=1",
    "--config.restart", f"--config={FILE}", "--config.rollout.branches", "(2,4)",
    "--config.seed=2", "--noconfig.restart", "--workdir=w",
  )  # fmt: skip
  assert (workdir, file) == ("w", FILE)
  assert config["rollout"]["branches"] == (2, 4)
  assert config["seed"] == 2 and not config["restart"]


def test_a_flag_that_is_given_again_stands_where_it_was_given_last():
  words = ["--config.seed=1", "--v=0", "--nolog", "--config.seed=2", "end"]
  given, arguments = command_line.split_words(words, Config)
  assert list(given.values()) == ["--v=0", "--nolog", "--config.seed=2"]
  assert arguments == ["end"]


def test_flags_of_a_file(tmp_path):
  (tmp_path / "flags").write_text(f"--config.seed=3\n--config.iterations=5\n--config={FILE}\n")
  config, workdir, file = parsed(
    f"--flagfile={tmp_path / 'flags'}", "--config.seed=4", "--workdir=w"
  )
  assert (config["seed"], config["iterations"], workdir, file) == (4, 5, "w", FILE)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--config.seed=1"], "no config is named: give --config=FILE, as in --config=configs/"),
    (["--config=", "--config.seed=1"], "no config is named"),
    (["--", f"--config={FILE}"], "no config is named"),
    ([f"--config={FILE}", "--", "--config.nope=1"], "unexpected argument '--config.nope=1'"),
    (["mine", f"--config={FILE}"], "unexpected argument 'mine'"),
    ([f"--config={FILE}", "-"], "unexpected argument '-'"),
    (["--workdr", "w", f"--config={FILE}"], "Unknown command line flag 'workdr'. Did .*: workdir"),
    ([f"--config={FILE}", "--config.seed"], "Missing value for flag --config.seed"),
    (["--noconfig.iteratons", f"--config={FILE}"], "no field 'iteratons', did you .*'iterations'"),
    (["--noconfig.seed", f"--config={FILE}"], "Unknown command line flag 'noconfig.seed'"),
    (["--config.rollout.branches=(2,", f"--config={FILE}"], "flag --config.rollout.branches="),
    (["--flagfile=none"], "Unable to open flagfile"),
  ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(words, message):
  with pytest.raises(UserError, match=message) as error:
    parsed("--workdir=w", *words)
  assert "\n" not in str(error.value)


def test_all_commands_take_overrides_before_the_config(tmp_path):
  cases = {
    "main": (FILE, "--config.rollout.prompts=0", "config.rollout.prompts is 0"),
    "evaluate": ("configs/eval.py:json", "--config.samples=0", "config.model names no model"),
    "plan": (FILE, "--config.rollout.slots=0", "config.rollout.slots is 0"),
  }
  processes = {
    message: subprocess.Popen(
      [sys.executable, "-m", f"spo_jax.{name}", field, f"--workdir={tmp_path}", "--config", file],
      cwd=tiny_run.REPOSITORY,
      env=tiny_run.environment(),
      stderr=subprocess.PIPE,
      text=True,
    )
    for name, (file, field, message) in cases.items()
  }
  for message, process in processes.items():
    _, errors = process.communicate(timeout=300)
    assert process.returncode == USER_ERROR_STATUS, errors
    assert errors.splitlines()[-1].startswith(f"spo_jax: {message}"), errors


def test_difference():
  old = {"a": 1, "b": {"c": [1, 2], "d": 3}, "e": 4}
  assert difference(old, old) == {}
  assert list(difference(old, {"a": 1, "b": {"c": [1, 3], "d": 3}, "f": 5})) == ["b.c", "f", "e"]


@pytest.mark.parametrize("module", ["main", "evaluate", "plan"])
def test_help_is_what_the_command_does_and_its_flags(module):
  told = subprocess.run(
    [sys.executable, "-m", f"spo_jax.{module}", "--help"],
    cwd=tiny_run.REPOSITORY,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert told.returncode == 0, told.stderr
  assert f"python -m spo_jax.{module}" in told.stdout and "--config" in told.stdout
  assert ("--export" in told.stdout) == (module == "main")


def test_numbers_of_processes_without_a_coordinator_are_a_mistake(tmp_path, capsys):
  words = tiny_run.command(CONFIG, tmp_path / "run")[2:] + ["--num_processes=2", "--process_id=0"]
  with flagsaver.flagsaver():
    status = command_line.run_command(words, Config, main.train_from_flags)
  assert status == USER_ERROR_STATUS
  assert "go with --coordinator=HOST:PORT" in told_of(capsys.readouterr().err)
  assert not (tmp_path / "run").exists()
