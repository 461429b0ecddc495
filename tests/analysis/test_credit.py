"""The instrument as a whole, in a world of short responses; and what it says to mistakes."""

import dataclasses
import json

import numpy as np
import pytest

from spo_jax.analysis import credit, pictures
from spo_jax.analysis.policy import Method, parse_methods, read_config
from spo_jax.analysis.values import Drawn
from spo_jax.config import Config
from spo_jax.errors import UserError
from tests.analysis.worlds import make_world

SIZES = (
  "--prompts=4 --samples=2 --rollouts=16 --prompts_at_once=4 --shares 12 40 --draws=4 --children=4 "
  "--rank_tokens=1 --budgets 200 400 --batches=4 --true_tokens=3200 --true_parts=4 "
  "--sampled_at_once=64"
)


def changed(config, **rollout):
  return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **rollout))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
  run, params = make_world()
  folder = tmp_path_factory.mktemp("credit")
  args = credit.parse_args([f"--workdir={folder}", f"--out={folder}", *SIZES.split()])
  config = run.config
  difference = dataclasses.replace(config.advantage, kind="difference")
  shrinkage = dataclasses.replace(config.advantage, kind="shrinkage")
  whole = dataclasses.replace(config.loss, normalization="constant")
  methods = [
    Method("RLOO", config),
    Method("chain", changed(dataclasses.replace(config, advantage=difference), strategy="chain")),
    Method("tree", changed(config, strategy="tree")),
    # Its advantages depend on all prompts of a batch, so its gradients alone are judged.
    Method("shrinkage", dataclasses.replace(config, advantage=shrinkage)),
  ]
  page = credit.judge(
    args, run, params, None, methods, Method("true", dataclasses.replace(config, loss=whole))
  )
  return folder, page


def test_all_methods_are_judged_at_all_shares_and_budgets(judged):
  folder, page = judged
  report = json.loads((folder / "credit.json").read_text())
  advantages = report["advantages"]
  assert [row["method"] for row in advantages] == ["RLOO", "tree", "RLOO", "chain", "tree"]
  assert all(row["tokens"] <= row["share"] for row in advantages)
  assert advantages[0]["tokens"] <= 12 and advantages[2]["tokens"] > 30
  assert all(np.isfinite(row["all_tokens"]["rmse"]) for row in advantages)
  assert set(report["gradients"]) == {"RLOO", "chain", "tree", "shrinkage"}
  for found in report["gradients"].values():
    assert [at["updates"] for at in found] == [4, 2]
    assert abs(found[0]["tokens"] / 200 - 1) < 0.2
  assert report["true_gradient"]["tokens"] > 3000
  assert page == (folder / "credit.md").read_text()
  rows = len(advantages) + 2 * len(report["gradients"])
  assert page.count("\n| ") == rows + 2 * 2  # heads and rules of two tables


def test_a_response_method_gives_all_tokens_of_a_response_the_same():
  advantages = np.arange(12.0).reshape(2, 1, 6)
  whole, each = (Drawn(None, advantages, of_response) for of_response in (True, False))
  np.testing.assert_array_equal(whole.of_trajectory(1, 3), [[3] * 3, [9] * 3])
  np.testing.assert_array_equal(each.of_trajectory(1, 3), [[1, 2, 3], [7, 8, 9]])


def test_pictures_are_drawn(judged):
  pytest.importorskip("matplotlib")
  folder, _ = judged
  for name in (pictures.TRAJECTORY_FILE, pictures.COSINE_FILE):
    assert (folder / name).stat().st_size > 10_000


def test_methods_are_configs_with_changes_on_the_task_of_the_run():
  base = dataclasses.replace(Config(), rollout=dataclasses.replace(Config().rollout, top_k=7))
  texts = [
    "a: configs/rloo.py rollout.samples=3",
    "b: configs/spo_tree.py:filler loss.scaling=whiten",
  ]
  a, b = parse_methods(texts, base, None)
  assert (a.name, a.config.rollout.samples, a.config.advantage.kind) == ("a", 3, "leave_one_out")
  assert (b.name, b.config.loss.scaling, b.config.rollout.segment_tokens) == (
    "b",
    "whiten",
    (32,),
  )
  for method in (a, b):
    assert method.config.rollout.top_k == 7 and method.config.loss.kl_coef == 0
    assert method.config.rollout.max_response_tokens == base.rollout.max_response_tokens


@pytest.mark.parametrize(
  "text, message",
  [
    ("configs/rloo.py", "is not of the form"),
    ("a: configs/rloo.py kind", "is not of the form"),
    ("a: configs/none.py", "there is no file"),
    ("a: configs/rloo.py loss.scalling=none", "scaling"),
    ("a: configs/rloo.py rollout.samples=many", "is no value"),
    ("a: configs/restem.py", "has no advantages"),
  ],
)
def test_a_method_that_cannot_be_is_told_in_one_line(text, message):
  with pytest.raises(UserError, match=message):
    parse_methods([text], Config(), None)


def test_a_method_given_twice_is_a_mistake():
  with pytest.raises(UserError, match="twice"):
    parse_methods(["a: configs/rloo.py"] * 2, Config(), None)


def test_config_of_a_workdir(tmp_path):
  with pytest.raises(UserError, match="cannot be read"):
    read_config(tmp_path)
  fields = dataclasses.asdict(Config()) | {"config_file": "configs/grpo.py:filler"}
  (tmp_path / "config.json").write_text(json.dumps(fields))
  assert read_config(tmp_path) == (Config(), "filler")


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--rollouts=5", "must be even"),
    ("--prompts=1", "at least 2"),
    ("--budgets=400 --budgets 400 600", "multiple of the first"),
    ("--budgets 10 1000", "less than two updates"),
  ],
)
def test_sizes_that_cannot_work(flag, message, capsys):
  assert credit.main(["--workdir=none", "--out=none", *flag.split()]) == 2
  assert message in capsys.readouterr().err
