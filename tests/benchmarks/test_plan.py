"""What is asked for becomes runs of the right length, in the right place."""

import dataclasses

import pytest

from benchmarks.compare import make_plan, parse_args
from benchmarks.comparison.budgets import (
  Budgets,
  Pace,
  length,
  pace,
  read_calibration,
  write_calibration,
)
from benchmarks.comparison.methods import (
  METHODS,
  TASKS,
  Method,
  check_common,
  find_methods,
  load_config,
)
from benchmarks.comparison.rates import at_edge, best, beyond
from spo_jax.config import Config
from spo_jax.errors import UserError
from tests.benchmarks.synthetic import rows

THREE_UPDATES = dataclasses.replace(Config(), minibatches=3, epochs=2, iterations=50)


def plan(tmp_path, *words):
  usual = [f"--folder={tmp_path}", "--methods", "spo_tree", "grpo", "--tasks", "arithmetic"]
  return make_plan(parse_args([*usual, *words]))


def test_pace_leaves_compilation_and_evaluation_out():
  found = pace(rows(4, 0.5, every=2, tokens=700, seconds=2.0))  # the third alone is neither
  assert found.tokens == 700
  assert found.seconds == pytest.approx(2.0)
  with pytest.raises(UserError, match="2 iterations does not tell"):
    pace(rows(2, 0.5, every=1))


def test_lengths():
  assert length(THREE_UPDATES, "own", Budgets(), None) == {"iterations": 50}
  budgets = Budgets(prompts=32, updates=120, tokens=1e6, seconds=90.0)
  # An iteration has 6 updates; its first epoch has 3, on 32 prompts each.
  expected = {"rollout.prompts": 96, "iterations": 20}
  assert length(THREE_UPDATES, "prompts", budgets, None) == expected
  paced = Pace(tokens=4000.0, seconds=0.5)
  assert length(THREE_UPDATES, "tokens", budgets, paced) == {"iterations": 250}
  assert length(THREE_UPDATES, "seconds", budgets, paced) == {"iterations": 180}
  assert length(THREE_UPDATES, "tokens", Budgets(tokens=1.0), paced) == {"iterations": 1}


def test_calibration_is_read_back(tmp_path):
  path = tmp_path / "calibration.json"
  assert read_calibration(path) == {}
  paces = {"arithmetic": {"grpo": Pace(1234.5, 0.25)}}
  write_calibration(path, paces)
  assert read_calibration(path) == paces
  path.write_text('{"arithmetic": {"grpo": {"speed": 1}}}')
  with pytest.raises(UserError, match="is no calibration"):
    read_calibration(path)


def test_the_best_rate_and_the_one_beyond():
  inside = {1e-4: [0.3, 0.4], 2e-4: [0.5, 0.3], 4e-4: [0.1, 0.2]}
  assert best(inside) == 2e-4 and beyond(inside) is None and not at_edge(inside)
  assert best({2e-4: [0.5], 1e-4: [0.5]}) == 1e-4
  assert beyond({2e-4: [0.1], 4e-4: [0.2], 1.6e-3: [0.3]}) == 6.4e-3
  assert beyond({2e-4: [0.3], 4e-4: [0.2], 1.6e-3: [0.1]}) == 1e-4
  assert beyond({2e-4: [0.3]}) is None


def test_a_run_differs_from_its_config_by_what_the_plan_says(tmp_path):
  made = plan(tmp_path, "--tokens=5e5", "--evaluations=5", "--set", "packing.rows=16")
  grpo = made.methods[1]
  run = made.test(grpo, "arithmetic", "tokens", 8e-4, 3, Pace(1000.0, 1.0))
  assert run.workdir == tmp_path / "arithmetic" / "tokens" / "test" / "grpo-lr0.0008-seed3"
  assert run.start == tmp_path / "warm_start" / "arithmetic-seed3"
  assert run.flags == [
    "--config=configs/grpo.py:arithmetic",
    "--config.packing.rows=16",
    "--config.seed=3",
    "--config.iterations=500",
    "--config.optimizer.learning_rate=0.0008",
    "--config.eval.split=test",
    "--config.eval.every=100",
  ]
  swept = made.sweep(grpo, "arithmetic", "tokens", 8e-4, 3, Pace(1000.0, 1.0))
  assert swept.fields["eval.split"] == "validation" and "sweep" in swept.workdir.parts
  own = plan(tmp_path, "--arms", "own").test(grpo, "arithmetic", "own", None, 0, None)
  config = load_config(grpo, "arithmetic", {})
  assert own.fields["iterations"] == config.iterations
  assert "optimizer.learning_rate" not in own.fields


def test_an_arm_needs_its_budget(tmp_path):
  with pytest.raises(UserError, match="'seconds' needs --seconds"):
    plan(tmp_path, "--arms", "seconds")
  with pytest.raises(UserError, match="'prompts' needs --updates"):
    plan(tmp_path, "--arms", "prompts", "--prompts=32")
  with pytest.raises(UserError, match="'tokens' needs --tokens"):
    plan(tmp_path, "--arms", "own", "--sweep_arm=tokens")


def test_mistakes_are_told_before_anything_runs(tmp_path):
  own = ("--arms", "own", "--set")
  with pytest.raises(UserError, match="unknown method 'gpro'"):
    find_methods(["gpro"])
  with pytest.raises(UserError, match="no field 'promts'"):
    plan(tmp_path, *own, "rollout.promts=8")
  with pytest.raises(UserError, match="method spo_tree, task arithmetic.*iterations"):
    plan(tmp_path, *own, "iterations='many'")
  with pytest.raises(UserError, match="sets no field"):
    plan(tmp_path, *own, "rollout.prompts")
  with pytest.raises(UserError, match="no config file 'configs/none.py'"):
    load_config(Method("none", "configs/none.py"), "arithmetic", {})
  with pytest.raises(UserError, match="unknown variant"):
    plan(tmp_path, "--arms", "own", "--tasks", "nope")


def test_methods_must_learn_the_same_task_from_the_same_policy():
  hot = Method("hot", "configs/grpo.py", {"rollout.temperature": 0.5})
  with pytest.raises(UserError, match="spo_tree and hot differ in config.rollout.temperature"):
    check_common([hot], "arithmetic", {})
  other = Method("other", "configs/grpo.py", {"warm_start.target_accuracy": 0.5})
  with pytest.raises(UserError, match="differ in config.warm_start "):
    check_common([other], "arithmetic", {})
  check_common(find_methods(["spo_tree", "spo_chain", "grpo", "configs/grpo.py"]), "filler", {})


@pytest.mark.parametrize("task", TASKS)
def test_every_method_fits_every_task(task):
  check_common(METHODS, task, {})
  budgets = load_config(find_methods(["spo_tree_paper"])[0], task, {}).budgets
  assert len(budgets) == 3 and min(budgets) > 0


def test_a_method_may_differ_by_task():
  one = Method("one", "configs/grpo.py", {"seed": 3, "epochs": 2}, {"filler": {"seed": 4}})
  seeds = {task: load_config(one, task, {}).seed for task in ("arithmetic", "filler")}
  assert seeds == {"arithmetic": 3, "filler": 4}
  assert load_config(one, "filler", {}).epochs == 2
  assert load_config(one, "filler", {"seed": 5}).seed == 5
