"""Mirrors of the record, and what they refuse; TensorBoard's steps are in test_metrics.py."""

import json
import math
import sys

import pytest

from spo_jax.errors import UserError
from spo_jax.infra.metrics import MetricWriter
from spo_jax.infra.sinks import TensorBoard, Wandb, open_sinks
from tests import fake_wandb

CONFIG = {"seed": 3, "rollout": {"prompts": 8}}


@pytest.fixture
def workdir(tmp_path):
  """With the config.json that a claimed workdir has."""
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  return tmp_path


def test_wandb_gets_config_and_lines_and_is_resumed(workdir, monkeypatch):
  runs = fake_wandb.install(monkeypatch)
  with MetricWriter(workdir, open_sinks(workdir, "spo")) as writer:
    writer.write({"iteration": 0, "train/loss": 0.5})
    position = writer.position()
    writer.write({"iteration": 1, "train/loss": math.nan, "train/segments": 7})
    assert not runs[0].finished
  with MetricWriter(workdir, open_sinks(workdir, "spo")) as writer:
    writer.restore(position)
    writer.write({"iteration": 1, "train/loss": 0.25})
  first, second = runs
  assert first.logged == [(0, {"train/loss": 0.5}), (1, {"train/segments": 7})]
  assert second.logged == [(1, {"train/loss": 0.25})]
  assert first.finished and second.finished
  assert first.given == second.given
  assert first.given == {
    "project": "spo",
    "dir": str(workdir),
    "id": (workdir / "wandb_id").read_text(),
    "resume": "allow",
    "config": CONFIG,
  }


def test_runs_of_two_workdirs_are_two(workdir, tmp_path_factory, monkeypatch):
  other = tmp_path_factory.mktemp("other")
  (other / "config.json").write_text("{}")
  runs = fake_wandb.install(monkeypatch)
  for folder in (workdir, other):
    Wandb(folder, "spo")
  assert runs[0].given["id"] != runs[1].given["id"]


def test_wandb_is_left_alone_unless_asked_for(workdir, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
  assert [type(sink) for sink in open_sinks(workdir, "")] == [TensorBoard]
  with pytest.raises(UserError, match="pip install wandb") as caught:
    open_sinks(workdir, "spo")
  assert "\n" not in str(caught.value)


def test_what_wandb_refuses_is_one_line(workdir, monkeypatch):
  fake_wandb.install(monkeypatch, refusal="No API key configured.\nUse `wandb login`.")
  with pytest.raises(UserError) as caught:
    open_sinks(workdir, "spo")
  assert str(caught.value) == (
    "config.wandb=spo cannot be used: No API key configured. Use `wandb login`."
  )
