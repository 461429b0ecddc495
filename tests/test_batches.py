"""An iteration's batch: what parts and threads must not change, and what ends them."""

import contextlib
import dataclasses
import threading
import types

import jax
import numpy as np
import pytest

from spo_jax import batches
from spo_jax.algorithms.partition import make_partition
from spo_jax.batches import deal, disagree, sample, take
from spo_jax.config import Config
from spo_jax.errors import UserError
from spo_jax.forest import interleave
from spo_jax.sampling.strategies import Prompts
from spo_jax.training.estimate import estimate
from tests.tiny import take_prompts, tiny_config, tiny_params, tiny_prompts, tiny_sampler
from tests.training.forests import path_forest, tree_forest

CFG = tiny_config(layers=1)
RECORDS = [{"answer": str(i)} for i in range(6)]
PATIENCE_S = 60  # of a thread that waits for another


def with_rollout(**fields) -> Config:
  return dataclasses.replace(Config(), rollout=dataclasses.replace(Config().rollout, **fields))


def grade(texts, answers, shaped):
  """A reward that depends on the response and on its prompt."""
  pairs = zip(texts, answers, strict=True)
  rewards = [(len(text) + 3 * int(answer) + text.count("1")) % 5 for text, answer in pairs]
  return np.array(rewards, np.float32), np.array([reward == 4 for reward in rewards])


def make_run(config, **task):
  """A run of the tiny model, whose task has `tiny_prompts` and anything for a text."""
  task = {
    "prompts": lambda records, *_: take_prompts(
      tiny_prompts(6), [int(record["answer"]) for record in records]
    ),
    "texts": lambda responses: [" ".join(map(str, response)) for response in responses],
    "grade": grade,
  } | task
  return types.SimpleNamespace(
    config=config,
    progress=types.SimpleNamespace(bar=lambda *_, **__: contextlib.nullcontext(lambda _: None)),
    task=types.SimpleNamespace(**task),
    key=lambda _: None,
    sampler=lambda **_: tiny_sampler(CFG, suffix_chunks=1),
    partition=lambda: make_partition(
      "fixed", threshold=0.9, interval=5, length=3, parts=4, delimiter_ids=()
    ),
  )


GROUP = {"strategy": "group", "samples": 4}
CHAIN = {"strategy": "chain", "samples": 2, "probes": 2, "probe_where": "mixed"}


@pytest.fixture(scope="module", params=[GROUP, CHAIN], ids=["group", "chain"])
def whole(request):
  """A shape of forests, and what `sample` gives for it in one part."""
  return request.param, sample_in_parts(request.param, 1)


def sample_in_parts(shape, parts, **more):
  rollout = shape | {"prompts": 6, "max_prompt_tokens": 6, "max_response_tokens": 9} | more
  return sample(make_run(with_rollout(**rollout, parts=parts)), tiny_params(CFG), RECORDS)


def without_times(metrics):
  return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def assert_same_batch(got, want):
  for name, a, b in zip(got[0]._fields, got[0], want[0], strict=True):
    compare = np.testing.assert_allclose if name == "logprobs" else np.testing.assert_array_equal
    compare(a, b, err_msg=name, **({"atol": 1e-5} if name == "logprobs" else {}))
    assert a.dtype == b.dtype, name
  np.testing.assert_array_equal(got[1], want[1])
  got, want = without_times(got[2]), without_times(want[2])
  assert got.keys() == want.keys()
  np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-6)


def test_parts_and_buckets_change_nothing_but_times(whole, monkeypatch):
  shape, (forest, rewards, metrics) = whole
  assert len(set(rewards[forest.leaf])) == 5 and metrics["train/grader_failures"] > 0
  if not forest.probe.any():
    assert_same_batch(sample_in_parts(shape, 2), (forest, rewards, metrics))
  else:
    assert len(np.unique(forest.tree[forest.probe])) < 6, "no prompt's trajectories agree"
    forest, order = interleave([forest], [np.arange(6)], by_level=False)  # probes by prompt
    rewards = rewards[order]
  widths = []
  grow = batches.grow
  monkeypatch.setattr(
    batches, "grow", lambda *args: widths.append(args[2].tokens.shape[1]) or grow(*args)
  )
  in_buckets = sample_in_parts(shape, 3, prompt_buckets=(5,))
  assert_same_batch(in_buckets, (forest, rewards, metrics))
  assert widths == [5, 5, 6]


class Graded:
  """Stands for sampling and grading: of each part one forest, whose reward is its number."""

  def __init__(self, monkeypatch, parts):
    self.graded = [threading.Event() for _ in range(parts)]
    self.threads = {}
    self.forest = tree_forest(np.random.default_rng(0), (1,), (2,), prompts=(2,))
    self.run = make_run(
      with_rollout(prompts=parts, parts=parts),
      prompts=lambda records, *_: tiny_prompts(len(records)),
    )
    monkeypatch.setattr(batches, "grow", lambda run, params, prompts, records: self.grow(records))
    monkeypatch.setattr(batches, "grade_share", lambda run, forest, records: self.grade(records))
    monkeypatch.setattr(batches, "settle", lambda run, forest, own: own)

  def sample(self):
    return sample(self.run, None, list(range(len(self.graded))))

  def grow(self, records):
    return self.forest

  def grade(self, records):
    (part,) = records
    self.threads[part] = threading.current_thread()
    self.graded[part].set()
    return np.array([np.nan, part], np.float32), 0


def test_a_part_is_graded_while_the_next_is_sampled(monkeypatch):
  engine = Graded(monkeypatch, 3)

  def grow(records):
    (part,) = records
    assert part == 0 or engine.graded[part - 1].wait(PATIENCE_S), "nobody grades meanwhile"
    return engine.forest

  engine.grow = grow
  forest, rewards, _ = engine.sample()
  np.testing.assert_array_equal(rewards[forest.leaf], [0, 1, 2])
  assert engine.threads[0] is engine.threads[1] is not threading.main_thread()
  assert engine.threads[2] is threading.main_thread()


def test_what_grading_raises_is_raised_here(monkeypatch):
  engine = Graded(monkeypatch, 2)

  def grade(records):
    if records == [0]:
      raise UserError("no such grader")
    return np.array([np.nan, 1], np.float32), 0

  engine.grade = grade
  with pytest.raises(UserError, match="^no such grader$"):
    engine.sample()


def test_an_interrupt_ends_what_is_graded_beside_and_what_waits(monkeypatch):
  engine = Graded(monkeypatch, 4)
  let_go = threading.Event()

  def grow(records):
    if records == [3]:  # the first part is being graded, two wait
      let_go.set()
      raise KeyboardInterrupt
    return engine.forest

  def grade(records):
    assert let_go.wait(PATIENCE_S)
    return Graded.grade(engine, records)

  engine.grow, engine.grade = grow, grade
  with pytest.raises(KeyboardInterrupt):
    engine.sample()
  assert engine.graded[0].is_set() and not any(e.is_set() for e in engine.graded[1:])
  assert not engine.threads[0].is_alive()


class Ahead:
  """Stands for sampling; batches are of two records, numbered."""

  def __init__(self, monkeypatch, ahead):
    source = [{"question": str(i), "answer": str(i)} for i in range(6)]
    run = make_run(with_rollout(prompts=2, ahead=ahead), split=lambda _: source)
    self.batches = batches.Batches(run)
    self.learner = types.SimpleNamespace(params=np.zeros(1))
    self.begun, self.updated, self.threads = threading.Event(), threading.Event(), []
    monkeypatch.setattr(batches, "sample", self.sample)

  def sample(self, run, params, records):
    self.threads.append(threading.current_thread())
    self.begun.set()
    assert self.updated.wait(PATIENCE_S)
    ordinal = records[0]["ordinal"]
    forest = tree_forest(np.random.default_rng(ordinal), (1,), (2,), prompts=(2, 2))
    return forest, np.full(4, params[0]), {"ordinal": ordinal}


def test_the_next_batch_is_sampled_beside_the_block(monkeypatch):
  engine = Ahead(monkeypatch, ahead=True)
  engine.updated.set()
  assert engine.batches.take([7.0]).metrics == {"ordinal": 0}
  engine.begun.clear()
  engine.updated.clear()
  with engine.batches.ahead(engine.learner):
    assert engine.begun.wait(PATIENCE_S), "nobody samples meanwhile"
    engine.learner.params[:] = np.nan  # as if donated
    engine.updated.set()
  batch = engine.batches.take([7.0])
  assert batch.metrics == {"ordinal": 2} and batch.rewards[0] == 0
  assert engine.threads[0] is threading.main_thread() is not engine.threads[1]
  assert engine.batches.take([7.0]).metrics == {"ordinal": 4}


def test_a_batch_that_waits_is_restored_with_its_rewards(monkeypatch):
  first = Ahead(monkeypatch, ahead=True)
  first.updated.set()
  first.batches.take([7.0])
  first.learner.params[:] = 0.25
  with first.batches.ahead(first.learner):
    pass
  record, arrays = first.batches.record(), first.batches.arrays()
  second = Ahead(monkeypatch, ahead=True)
  second.batches.restore(record, arrays)
  want, got = first.batches.take([7.0]), second.batches.take([7.0])
  assert want.rewards.tolist() == [0.25] * 4 and [r["ordinal"] for r in want.records] == [2, 3]
  jax.tree.map(np.testing.assert_array_equal, want, got)


def test_without_ahead_there_is_the_block_alone(monkeypatch):
  engine = Ahead(monkeypatch, ahead=False)
  engine.updated.set()
  with engine.batches.ahead(engine.learner):
    pass
  assert not engine.threads and engine.batches.arrays() == {}
  assert engine.batches.take([7.0]).rewards[0] == 7


def test_an_update_that_is_interrupted_ends_what_is_sampled_beside(monkeypatch):
  engine = Ahead(monkeypatch, ahead=True)
  with pytest.raises(KeyboardInterrupt), engine.batches.ahead(engine.learner):
    assert engine.begun.wait(PATIENCE_S)
    engine.updated.set()
    raise KeyboardInterrupt
  assert not engine.threads[0].is_alive()


def test_what_sampling_ahead_raises_is_raised_after_the_block(monkeypatch):
  engine = Ahead(monkeypatch, ahead=True)
  monkeypatch.setattr(batches, "sample", lambda *_: (_ for _ in ()).throw(UserError("no room")))
  with pytest.raises(UserError, match="^no room$"), engine.batches.ahead(engine.learner):
    engine.begun.set()


def test_a_part_is_prefilled_at_the_least_width_that_holds_it():
  lengths = np.array([9, 2, 5, 3, 4, 4])
  prompts = Prompts(np.arange(60).reshape(6, 10), lengths, np.arange(6))
  rollout = with_rollout(parts=3, prompt_buckets=(4, 5, 8)).rollout
  rows = deal(lengths, rollout)
  np.testing.assert_array_equal(rows, [[1, 3], [4, 5], [0, 2]])
  parts = [take(prompts, part, rollout) for part in rows]
  assert [part.tokens.shape for part in parts] == [(2, 4), (2, 4), (2, 10)]
  np.testing.assert_array_equal(parts[1].tokens, [[40, 41, 42, 43], [50, 51, 52, 53]])
  np.testing.assert_array_equal(parts[1].keys, [4, 5])
  rollout = dataclasses.replace(rollout, prompt_buckets=())
  np.testing.assert_array_equal(deal(lengths, rollout), [[0, 1], [2, 3], [4, 5]])
  one = dataclasses.replace(rollout, parts=1)
  assert take(prompts, *deal(lengths, one), one) is prompts


def test_one_part_needs_no_thread(monkeypatch):
  engine = Graded(monkeypatch, 1)
  engine.sample()
  assert engine.threads[0] is threading.main_thread()


def test_the_mean_reward_is_the_value_of_the_prompts(monkeypatch):
  rng = np.random.default_rng(3)
  forest = tree_forest(rng, (3, 2, 2), (2, 2, 2), prompts=(2, 3), ragged=True)
  rewards = np.where(forest.leaf, rng.random(len(forest.parent)), np.nan).astype(np.float32)
  monkeypatch.setattr(batches, "grow", lambda *_: forest)
  monkeypatch.setattr(batches, "grade_share", lambda *_: None)
  monkeypatch.setattr(batches, "settle", lambda *_: (rewards, 0))
  *_, metrics = sample(make_run(Config()), None, RECORDS)
  values = estimate(forest, rewards, Config().advantage, probed=False).values
  np.testing.assert_allclose(
    metrics["train/reward_mean"], values[forest.depth == 0].mean(), rtol=1e-5
  )
  assert abs(metrics["train/reward_mean"] - np.nanmean(rewards)) > 1e-3


def test_prompts_whose_trajectories_differ_in_reward_are_the_mixed_ones():
  forest = path_forest(np.random.default_rng(0), [2] * 6, [3] * 6)
  forest = forest._replace(tree=np.tile(np.repeat([0, 1, 2], 2), 2))
  rewards = iter([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
  task = types.SimpleNamespace(
    texts=lambda responses: ["" for _ in responses],
    grade=lambda texts, answers, shaped: (
      np.array([next(rewards) for _ in texts], np.float32),
      np.zeros(len(texts), bool),
    ),
  )
  run = types.SimpleNamespace(config=Config(), task=task)
  records = [{"answer": ""}] * 3
  assert disagree(run, records, forest).tolist() == [True, False, False]
