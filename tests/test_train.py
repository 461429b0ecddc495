"""The whole loop, small: every method trains, writes what it promises, and resumes exactly."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from benchmarks.run_processes import SIGNAL, metrics_without_timings
from configs import dpo_positive, dr_grpo, grpo, ppo, restem, rloo, spo_chain, spo_tree, vineppo
from spo_jax import batches
from spo_jax.command_line import claim_workdir
from spo_jax.config import Config
from spo_jax.config_check import from_config_dict
from spo_jax.errors import UserError
from spo_jax.infra.checkpoints import Checkpoints
from spo_jax.infra.compilation import made_programs
from spo_jax.infra.progress import Progress
from spo_jax.main import MAY_CHANGE, RESULTS
from spo_jax.run import make_run
from spo_jax.sampling.sampler import compiled_programs
from spo_jax.train import train
from spo_jax.training.step import init_state
from tests import fake_wandb, tiny_run

CONTRACT = {
  "iteration",
  "train/reward_mean",
  "train/loss",
  "train/kl",
  "train/clip_fraction",
  "train/grad_norm",
  "train/segments",
  "tokens/sampled",
  "tokens/trained",
  "time/elapsed_s",
  "time/rollout_s",
  "time/update_s",
  "speed/sampled_tokens_s",
  "speed/trained_tokens_s",
  "speed/goodput",
}


def tiny_config(module, **overrides):
  config = module.get_config()
  fields = tiny_run.TINY | {name.replace("__", "."): value for name, value in overrides.items()}
  config.update_from_flattened_dict(fields)
  return from_config_dict(config, Config)


def run_once(config, workdir: pathlib.Path, **options):
  claim_workdir(workdir, dataclasses.asdict(config), results=RESULTS, may_change=MAY_CHANGE)
  with Progress(config.iterations) as progress:
    train(make_run(config, workdir, progress), **options)
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tree_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("tree")
  config = tiny_config(spo_tree, **SIGNAL, new_model__layers=2)
  return config, workdir, run_once(config, workdir)


def test_tree_writes_what_the_contract_promises(tree_run):
  config, workdir, lines = tree_run
  assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4]
  assert sum(line["train/skipped"] for line in lines[1:]) < 4
  for line in lines[1:]:
    assert line.keys() >= CONTRACT
  evaluated = [line["iteration"] for line in lines if "eval/accuracy" in line]
  assert evaluated == [0, 2, 4]
  assert all("eval/accuracy_greedy" in lines[i] for i in evaluated)
  assert lines[1]["time/programs"] > 0 and lines[1]["time/compile_s"] > 0
  assert [line["time/programs"] for line in lines[2:]] == [0] * 3, "all is compiled at first"
  for column in ("tokens/sampled", "tokens/trained", "time/elapsed_s"):
    assert np.all(np.diff([line[column] for line in lines]) >= 0)
  for line in lines[1:]:
    assert 0 < line["speed/goodput"] < 1
    packed_s = line["train/packed_tokens"] / line["time/update_s"]
    assert line["speed/trained_tokens_s"] == pytest.approx(packed_s)
  assert (workdir / "report.html").exists()
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == [
    "2",
    "4",
  ]
  assert json.loads((workdir / "config.json").read_text())["iterations"] == config.iterations
  first = json.loads((workdir / "rollouts" / "first.json").read_text())
  assert first["iteration"] == 1
  assert "".join(first["nodes"][0]["tokens"]).split() == first["prompt"].split()


POOLED = {
  "advantage__train_probes": True,
  "advantage__pool_trajectory": True,
  "loss__segment_weights": "share",
  "loss__normalization": "sequence",
}
ADAPTIVE = {"loss__kl_control": "adaptive", "loss__kl_horizon": 100}
SHARED = ADAPTIVE | {
  "critic__trunk": "shared",
  "loss__kl_in": "reward",
  "loss__forward_kl_coef": 0.1,
}


REPLAY = {
  "rollout__segment_tokens": (4,),
  "replay__max_age": 4,
  "replay__segments_per_question": 2,
}
INT8 = {
  "rollout__segment_tokens": (4,),
  "rollout__weights": "int8",
  "rollout__cache": "int8",
  "loss__importance_cap": 2.0,
}
SMALL = SIGNAL | {
  "rollout__slots": 16,
  "rollout__samples": 4,
  "rollout__max_response_tokens": 16,
  "iterations": 2,
  "warm_start__max_steps": 0,
}


@pytest.mark.parametrize(
  ("module", "overrides"),
  [
    pytest.param(spo_tree, INT8, id="tree-int8"),
    pytest.param(spo_chain, {}, id="chain"),
    pytest.param(spo_chain, POOLED, id="chain-pooled"),
    pytest.param(vineppo, {}, id="vineppo"),
    pytest.param(grpo, {}, id="group"),
    pytest.param(rloo, {}, id="rloo"),
    pytest.param(dr_grpo, {}, id="dr_grpo"),
    pytest.param(ppo, ADAPTIVE, id="ppo"),
    pytest.param(ppo, SHARED, id="ppo-shared"),
    pytest.param(restem, {"minibatches": 2, "epochs": 2}, id="restem"),
    pytest.param(dpo_positive, {"minibatches": 2, "epochs": 2}, id="dpo_positive"),
  ],
)
def test_every_method_runs(module, overrides, tmp_path):
  lines = run_once(tiny_config(module, **SMALL | overrides), tmp_path)
  assert lines[-1].keys() >= CONTRACT
  assert lines[-1]["tokens/sampled"] > 0
  assert lines[-1]["train/skipped"] < 0.5 and lines[-1]["train/segments"] > 0
  assert ("train/explained_variance" in lines[-1]) == (module is ppo)
  assert (lines[-1].get("train/logprob_gap", 0.0) > 0) == (overrides is INT8)


def test_resuming_is_exact_and_compiles_nothing_new(tree_run, tmp_path):
  config, workdir, lines = tree_run
  run_once(dataclasses.replace(config, iterations=2), tmp_path)
  before = compiled_programs()
  resumed = run_once(config, tmp_path)
  assert compiled_programs() == before
  assert metrics_without_timings(tmp_path) == metrics_without_timings(workdir)
  assert len(resumed) == len(lines)
  saved = []
  for folder in (workdir, tmp_path):
    with Progress(config.iterations) as progress:
      run = make_run(config, folder, progress)
    state = init_state(run.initial_params(), config.optimizer)
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    saved.append(checkpoints.restore(4, state)[0])
    early, late = (checkpoints.restore(step, state)[1]["counters"] for step in (2, 4))
    checkpoints.close()
    assert early["began_at"] == late["began_at"]
    assert 0 < early["trained_s"] < late["trained_s"] < late["elapsed_s"]
  jax.tree.map(np.testing.assert_array_equal, *saved)


def test_a_run_that_is_watched(tmp_path, monkeypatch):
  """Weights & Biases has the lines of the record, and the traces are of the chosen iterations."""
  runs = fake_wandb.install(monkeypatch)
  config = tiny_config(spo_tree, **SMALL, rollout__segment_tokens=(4,), wandb="spo")
  lines = run_once(config, tmp_path, profile=(2,))
  (run,) = runs
  assert run.given["config"] == json.loads((tmp_path / "config.json").read_text())
  assert [{"iteration": step, **metrics} for step, metrics in run.logged] == lines and run.finished
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  assert trace.is_relative_to(tmp_path / "profile" / "iteration_2" / "process_0")
  assert trace.stat().st_size > 0


def test_missing_wandb_is_told_before_anything_is_compiled(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
  before = made_programs()
  with pytest.raises(UserError, match="pip install wandb"):
    run_once(tiny_config(spo_tree, wandb="spo"), tmp_path)
  assert made_programs() == before


@pytest.mark.parametrize(
  ("module", "overrides"),
  [
    pytest.param(ppo, ADAPTIVE, id="critic-and-kl"),
    pytest.param(spo_tree, REPLAY, id="replay"),
    pytest.param(spo_tree, REPLAY | {"rollout__ahead": True}, id="replay-ahead"),
  ],
)
def test_what_a_method_keeps_beside_its_policy_is_resumed(module, overrides, tmp_path):
  fields = SMALL | overrides | {"iterations": 3, "checkpoint__every": 1}
  config = tiny_config(module, **fields)
  run_once(config, tmp_path / "whole")
  run_once(dataclasses.replace(config, iterations=1), tmp_path / "resumed")
  lines = run_once(config, tmp_path / "resumed")
  got, want = (metrics_without_timings(tmp_path / name) for name in ("resumed", "whole"))
  # The shorter run evaluated its last iteration too.
  assert [got[0], *got[2:]] == [want[0], *want[2:]]
  assert all(line["train/skipped"] < 1 for line in lines[1:])
  if module is ppo:
    assert lines[3]["train/kl_coef"] != lines[2]["train/kl_coef"] != config.loss.kl_coef
  else:
    assert lines[1]["replay/waiting"] > 0 and lines[3]["replay/expired"] == 0
    assert lines[3]["train/segments"] > 2 * config.rollout.prompts  # older ones with the new


def test_a_checkpoint_is_made_when_one_is_overdue(tmp_path):
  fields = {"rollout__segment_tokens": (4,), "checkpoint__every": 9, "checkpoint__every_s": 0.0}
  run_once(tiny_config(spo_tree, **SMALL | fields), tmp_path)
  saved = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
  assert saved == {"1", "2"}


def test_a_run_without_sound_updates_stops_and_saves_none_of_them(tmp_path):
  fields = SMALL | {"rollout__segment_tokens": (4,), "loss__ratio_threshold": 1e-3}
  fields |= {"unstable_limit": 2, "checkpoint__every": 1}
  config = tiny_config(spo_tree, **fields | {"iterations": 9})
  with pytest.raises(UserError, match="of the last 2 iterations was sound: .* gradient norm"):
    run_once(config, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["train/unstable"] for line in lines[-2:]] == [1, 1]
  saved = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
  assert not saved & {lines[-1]["iteration"], lines[-2]["iteration"]}


def test_what_is_sampled_ahead_is_of_the_policy_before_the_update(tmp_path, monkeypatch):
  fields = SMALL | REPLAY | {"rollout__ahead": True, "iterations": 3, "checkpoint__every": 1}
  # The schedule of a longer run: the programs are those of the tests above.
  config = dataclasses.replace(tiny_config(spo_tree, **fields), iterations=2)
  sample, calls = batches.sample, []

  def record(run, params, records):
    at_first = jax.tree.map(np.array, params)
    calls.append((run, at_first, records, sample(run, params, records)))
    return calls[-1][-1]

  with monkeypatch.context() as patch:
    patch.setattr(batches, "sample", record)
    lines = run_once(config, tmp_path)
  run, policies = calls[0][0], [call[1] for call in calls]
  initial = run.initial_params()
  is_initial = [all(jax.tree.leaves(jax.tree.map(np.array_equal, p, initial))) for p in policies]
  assert is_initial == [True, True, False]  # the third waits for a run of more iterations
  _, _, records, (forest, rewards, _) = calls[1]
  assert [record["ordinal"] for record in records] == list(range(8, 16))
  wanted, wanted_rewards, metrics = sample(run, initial, records)
  jax.tree.map(np.testing.assert_array_equal, (forest, rewards), (wanted, wanted_rewards))
  assert lines[2]["train/reward_mean"] == metrics["train/reward_mean"]
  assert lines[2]["tokens/sampled"] > lines[1]["tokens/sampled"] > 0
  changed = dataclasses.replace(config.rollout, ahead=False)
  with pytest.raises(
    UserError, match="another config .config.rollout.ahead was True and is False."
  ):
    run_once(dataclasses.replace(config, rollout=changed), tmp_path)
