"""The benchmark of whole iterations: our engine at a tiny size, tables of synthetic times."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import iteration, peers
from benchmarks import iteration_engines as engines
from spo_jax.errors import UserError

JOB = engines.Job(iterations=2, prompts=2, samples=3, prompt=5, new=4, vocab=48)


@pytest.fixture(scope="module")
def folder():
  with peers.checkpoint(peers.random_model(1, 32, JOB.vocab)) as path:
    yield path


def check(told):
  assert len(told.ends) == len(told.rewards) == JOB.iterations
  assert 0 < told.ends[0] < told.ends[1]
  # The random model draws even and odd numbers alike: 2 of 4 tokens, on average.
  assert all(0.5 < reward < 3.5 for reward in told.rewards)


def test_our_iterations(folder):
  told = engines.ours(folder, JOB)
  check(told)
  parts = np.sum(list(told.parts.values()), axis=0)
  assert set(told.parts) == {"rollout", "grade", "pack", "update"}
  assert parts[1] <= told.ends[1] - told.ends[0]


def test_iterations_of_tunix(folder):
  if gone := peers.missing("tunix"):
    pytest.skip(f"{', '.join(gone)} is not installed")
  check(engines.tunix(folder, JOB))


def test_a_packed_row_holds_a_whole_group():
  config = engines.grpo_config(JOB)
  assert config.packing.row_length == 5 + 3 * 4 == config.longest_tree
  assert config.branches == (3,) and config.budgets == (4,)


def test_prompts_and_rewards():
  texts = engines.prompt_texts(JOB, 1)
  assert [len(text.split()) for text in texts] == [5, 5]
  assert texts == engines.prompt_texts(JOB, 1) != engines.prompt_texts(JOB, 2)
  assert engines.even_numbers("4 17 0 48") == 3


def row(i, *, seconds=2.0, programs=0, **more):
  parts = {"time/rollout_s": 0.8, "time/grade_s": 0.1, "time/pack_s": 0.1, "time/update_s": 0.5}
  told = {"iteration": i, "time/elapsed_s": seconds * i, "time/programs": programs}
  return told | parts | {"train/response_tokens": 30.0} | more


def test_shares_leave_out_what_compiles_or_evaluates():
  rows = [row(0), row(1, programs=9), row(2), row(3), row(4, **{"eval/accuracy": 0.5})]
  rows[4]["time/elapsed_s"] += 50
  found = iteration.shares(rows)
  assert found["iterations"] == 2
  expected = {"sampling": 0.8, "grading": 0.1, "packing": 0.1, "update": 0.5, "else": 0.5}
  assert found["seconds"] == pytest.approx(expected)
  with pytest.raises(UserError, match="--spo-tree"):
    iteration.shares(rows[:2])


def test_tables_and_record(capsys, monkeypatch):
  told = {"ours": [3.0, 4.0, 5.0, 6.0], "tunix": [9.0, 11.0, 13.0, 18.0]}

  def pretend(words):
    if words[0] == "spo_jax.main":
      return ""
    asked = engines.Job(**json.loads(words[3]))
    assert asked == dataclasses.replace(JOB, iterations=4)
    line = dataclasses.asdict(engines.Timeline(told[words[1]], [2.0] * 4, {}))
    return "a note\n" + json.dumps(line) + "\n"

  monkeypatch.setattr(iteration, "run_process", pretend)
  monkeypatch.setattr(iteration, "read_metrics", lambda path: [row(i) for i in range(5)])
  monkeypatch.setattr(peers.Tunix, "needs", ())
  words = "--layers 1 --width 32 --vocab 48 --prompts 2 --samples 3 --prompt 5 --new 4 --repeats 3"
  assert iteration.main(words.split()) == 0
  *table, line = capsys.readouterr().out.splitlines()
  record = json.loads(line)
  assert record["engines"]["tunix"]["seconds"] == [2.0, 2.0, 5.0]
  assert record["engines"]["tunix"]["start_s"] == 9.0 and record["engines"]["ours"]["all_s"] == 6.0
  (ratios,) = (line for line in table if line.startswith("tunix / ours"))
  assert ratios.split()[3:8] == ["2.00", "2.00", "5.00", "3.00", "3.00"]
  assert record["shares"]["seconds"]["update"] == pytest.approx(0.5)
  assert "40%" in next(line for line in table if line.startswith("sampling"))


def test_mistakes_are_told(capsys, monkeypatch):
  assert iteration.main(["--width", "34", "--peers"]) == 2
  assert "--width 34" in capsys.readouterr().err
  for words, told in (("--samples 1", "--samples"), ("--spo-tree 2", "4 are the least")):
    with pytest.raises(SystemExit):
      iteration.parse_args(words.split())
    assert told in capsys.readouterr().err
  monkeypatch.setattr(iteration, "PAUSE_S", 0.0)
  with pytest.raises(UserError, match="no_such_module .* failed with status 1"):
    iteration.run_process(["no_such_module", "x"])
