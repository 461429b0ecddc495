"""The command that plans: its flags, the models that it knows, its exit status, its JSON."""

import dataclasses
import json
import subprocess
import sys

import pytest

from configs import spo_tree
from configs.experiments import EXPERIMENTS, R1_MATH_32K
from spo_jax import plan
from spo_jax.config import Config
from spo_jax.config_check import from_config_dict
from spo_jax.errors import UserError
from spo_jax.infra.mesh import make_mesh
from spo_jax.models.decoder import count_params
from spo_jax.models.families import config_from_hf
from spo_jax.models.known import KNOWN_MODELS
from spo_jax.planning import programs
from tests.tiny_run import REPOSITORY, TINY, environment

COUNTS = {
  "realtreetune/rho-1b-sft-GSM8K": 1_100_048_384,
  "realtreetune/rho-1b-sft-MATH": 1_100_048_384,
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
  "Qwen/Qwen2.5-1.5B": 1_543_714_304,
  "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
  "realtreetune/deepseekmath-7b-sft-GSM8K": 6_910_365_696,
  "realtreetune/deepseekmath-7b-sft-MATH-v2": 6_910_365_696,
}


def test_the_papers_models_are_known_with_their_sizes():
  experiments = (*EXPERIMENTS.values(), R1_MATH_32K)
  assert {experiment.model for experiment in experiments} == set(COUNTS)
  mesh = make_mesh(1, 1, 1)
  for name, count in COUNTS.items():
    setup = programs.Setup(Config(), config_from_hf(KNOWN_MODELS[name]), mesh)
    assert count_params(programs.abstract_params(setup)) == count, name


def test_a_folder_needs_a_config_json_alone(tmp_path):
  hf = KNOWN_MODELS["Qwen/Qwen2.5-0.5B-Instruct"]
  (tmp_path / "config.json").write_text(json.dumps(hf))
  found = plan.planned_decoder(dataclasses.replace(Config(), model=str(tmp_path)))
  assert found == config_from_hf(hf)
  with pytest.raises(UserError, match="'who/knows' is no folder.*give a folder"):
    plan.planned_decoder(dataclasses.replace(Config(), model="who/knows"))


def test_layers_are_two_different_numbers_from_two_or_none():
  assert plan._parse_layers([]) == () and plan._parse_layers(["2", "4"]) == (2, 4)
  for wrong in (["2"], ["2", "x"], ["2", "2"], ["1", "2"], ["2", "0"], ["2", "3", "4"]):
    with pytest.raises(UserError, match="--layers=.* must be two different numbers from 2"):
      plan._parse_layers(wrong)


def test_the_command_writes_json_and_says_by_its_status_that_it_does_not_fit(tmp_path):
  fields = TINY | {
    "new_model.layers": 1,
    "rollout.strategy": "group",
    "rollout.samples": 2,
    "rollout.slots": 8,
    "mesh.data": -1,
  }
  path = tmp_path / "plan.json"
  done = subprocess.run(
    [sys.executable, "-m", "spo_jax.plan", "--config=configs/spo_tree.py", "--topology=cpu:8"]
    + [f"--config.{name}={value}" for name, value in fields.items()]
    + ["--chip_gib=0.0005", "--nolargest", f"--json={path}"],
    cwd=REPOSITORY,
    env=environment(),
    capture_output=True,
    text=True,
  )
  assert done.returncode == plan.DOES_NOT_FIT_STATUS, done.stderr
  found = json.loads(path.read_text())
  assert found["mesh"] == {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1} and not found["fits"]
  assert {p["name"] for p in found["programs"]} == {"prepare", "train_step", "prefill", "decode"}
  assert all(p["total"] > 0 and p["seconds"] > 0 for p in found["programs"])
  fit = {p["fits"]: p["total"] <= found["chip_bytes"] for p in found["programs"]}
  assert fit == {True: True, False: False}
  assert found["state"]["moments"] > found["state"]["parameters"] > 0
  assert "It does not fit" in done.stdout and "compiled update/train_step" in done.stderr


def test_the_command_line_goes_before_the_config():
  there = dataclasses.replace(Config(), topology="v5e:2x4")
  assert plan.chosen_topology(None, there) == "v5e:2x4"
  assert plan.chosen_topology("v5p:2x2x2", there) == "v5p:2x2x2"
  with pytest.raises(UserError, match="names no topology: give --topology"):
    plan.chosen_topology(None, Config())


def test_the_planned_decoder_computes_as_the_config_says():
  config = spo_tree.get_config("qwen1.5b_math")
  decoder = plan.planned_decoder(from_config_dict(config, Config))
  assert (decoder.attention, decoder.dtype, decoder.remat) == ("flash", "bfloat16", "blocks")
  assert decoder.layers == 28
