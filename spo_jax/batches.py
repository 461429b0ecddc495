"""An iteration's batch: a forest that is sampled for its prompts, and the rewards of its leaves.

Host and device work side by side in two places: a part of the prompts is graded while the next is
sampled, and with `config.rollout.ahead` the next batch is sampled while one is trained on.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.config import RolloutConfig
from spo_jax.data import source
from spo_jax.forest import Forest, interleave
from spo_jax.infra import hosts
from spo_jax.learner import Learner
from spo_jax.rewards import shape_unfinished
from spo_jax.run import Run
from spo_jax.sampling import strategies
from spo_jax.training.weights import shares

_AHEAD = "ahead_"  # begins the names of a waiting batch's arrays


class Batch(NamedTuple):
  """What an iteration learns from."""

  records: list[dict[str, Any]]  # R prompts
  forest: Forest  # N nodes
  rewards: np.ndarray  # [N] float32 to train on, NaN at inner nodes
  metrics: dict[str, float]


class Batches:
  """The batches of a run in their order. `record` and `arrays` are its part of a checkpoint."""

  def __init__(self, run: Run):
    """Begins with the first prompts."""
    self._run = run
    self._iterator = source.make_iterator(
      run.task.split("train"),
      batch_size=run.config.rollout.prompts,
      seed=run.config.seed,
      replacement=run.config.data.replacement,
    )
    self._position = self._iterator.get_state()  # of the batch that `take` gives next
    self._waiting: Batch | None = None  # that batch, if it was sampled ahead

  def take(self, params: Any) -> Batch:
    """The next batch: the one that waits, or else one that these parameters sample."""
    batch, self._waiting = self._waiting, None
    if batch is None:
      records = next(self._iterator)
      batch = Batch(records, *sample(self._run, params, records))
    self._position = self._iterator.get_state()
    return batch

  @contextlib.contextmanager
  def ahead(self, learner: Learner) -> Iterator[None]:
    """Samples the next batch beside the block, in which the learner takes its steps.

    Without `config.rollout.ahead` there is the block alone. With it, a run samples one batch more
    than it trains on: a run of more iterations goes on with that.
    """
    if not self._run.config.rollout.ahead:
      yield
      return
    records = next(self._iterator)
    # Copied before the block: an update donates the parameters, and so deletes them while the
    # thread has programs yet to start with them.
    params = jax.tree.map(jnp.copy, learner.params)
    with one_thread() as thread:
      sampled = thread.submit(sample, self._run, params, records)
      yield
      self._waiting = Batch(records, *sampled.result())

  def record(self) -> dict[str, Any]:
    """What checkpoints hold in JSON; the records that wait are drawn again."""
    waiting = self._waiting
    return {"iterator": self._position, "ahead": None if waiting is None else waiting.metrics}

  def arrays(self) -> dict[str, np.ndarray]:
    """What checkpoints hold in host arrays: the forest that waits and its rewards, if any do."""
    if self._waiting is None:
      return {}
    columns = self._waiting.forest._asdict() | {"rewards": self._waiting.rewards}
    return {_AHEAD + name: column for name, column in columns.items()}

  def restore(self, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Takes up where `record` and `arrays` were given."""
    self._position = record["iterator"]
    self._iterator.set_state(self._position)
    if self._run.config.rollout.ahead:
      forest = Forest(**{name: arrays[_AHEAD + name] for name in Forest._fields})
      records, rewards = next(self._iterator), arrays[_AHEAD + "rewards"]
      self._waiting = Batch(records, forest, rewards, record["ahead"])


def sample(
  run: Run, params: Any, records: list[dict[str, Any]]
) -> tuple[Forest, np.ndarray, dict[str, float]]:
  """Samples a forest for a batch of prompts and grades its leaves.

  Returns:
    (forest, rewards [N] to train on with NaN at inner nodes, metrics).
  """
  began = time.perf_counter()
  with run.progress.bar("rollout", total=run.config.rollout.parts + 1) as advance:
    forest, rewards, failed, sampled = sample_parts(run, params, records, advance)
  own = np.flatnonzero(forest.leaf & ~forest.probe)
  path_tokens = [len(forest.response(leaf)) for leaf in own]
  weights = shares(forest, probes=False)
  return (
    forest,
    rewards,
    {
      # Siblings share alike: V of the prompts.
      "train/reward_mean": float(np.average(rewards[own], weights=weights[own])),
      "train/finished": float(np.mean(forest.finished[own])),
      "train/response_tokens": float(np.mean(path_tokens)),
      "train/segments_sampled": int(np.sum((forest.depth > 0) & ~forest.probe)),
      "train/grader_failures": failed,
      "time/rollout_s": sampled - began,
      "time/grade_s": time.perf_counter() - sampled,
    },
  )


def sample_parts(
  run: Run, params: Any, records: list[dict[str, Any]], advance: Callable[..., None]
) -> tuple[Forest, np.ndarray, int, float]:
  """Samples the prompts part by part; a part is graded on a thread while the next is sampled.

  Returns:
    (forest and rewards as of `sample`, number of leaves that the grader failed on, the time at
    which all was sampled).
  """
  rollout = run.config.rollout
  prompts = run.task.prompts(records, run.key("rollout"), "ordinal")
  rows = deal(prompts.lengths, rollout)
  forests, grades = [], []
  with one_thread() as thread:
    for part in rows:
      if grades:
        grades[-1] = thread.submit(grades[-1]).result
      of_part = [records[row] for row in part]
      forests.append(grow(run, params, take(prompts, part, rollout), of_part))
      grades.append(functools.partial(grade_share, run, forests[-1], of_part))
      advance(1)
    sampled = time.perf_counter()
    # The last part is graded here, as nothing is sampled beside it.
    own = [graded() for graded in grades]
    settled = [settle(run, *pair) for pair in zip(forests, own, strict=True)]
    rewards, failed = zip(*settled, strict=True)
    advance(1)
  if rollout.parts == 1:
    return forests[0], rewards[0], failed[0], sampled
  forest, order = interleave(forests, rows, by_level=rollout.strategy != "chain")
  return forest, np.concatenate(rewards)[order], sum(failed), sampled


def deal(lengths: np.ndarray, rollout: RolloutConfig) -> np.ndarray:
  """[parts, R / parts] rows of the parts' prompts: as they come, or by length with buckets."""
  order = np.arange(len(lengths))
  if rollout.prompt_buckets:
    order = np.argsort(lengths, kind="stable")
  return np.sort(order.reshape(rollout.parts, -1))


def take(
  prompts: strategies.Prompts, rows: np.ndarray, rollout: RolloutConfig
) -> strategies.Prompts:
  """The prompts of a part, at the least width that holds them."""
  longest, width = prompts.lengths[rows].max(), prompts.tokens.shape[1]
  least = min((bucket for bucket in rollout.prompt_buckets if bucket >= longest), default=width)
  if (len(rows), least) == prompts.tokens.shape:
    return prompts
  return prompts.take(rows, least)


@contextlib.contextmanager
def one_thread() -> Iterator[ThreadPoolExecutor]:
  """A thread for what is done beside the block.

  A block that is left by an exception, an interrupt for instance, waits for what the thread has
  begun, and drops the rest.
  """
  executor = ThreadPoolExecutor(max_workers=1)
  try:
    yield executor
  finally:
    executor.shutdown(cancel_futures=True)


class Graded(NamedTuple):
  """This process's share of a forest's leaves."""

  rewards: np.ndarray  # float32
  failed: np.ndarray  # bool, the grader failed


def grade_share(run: Run, forest: Forest, records: list[dict[str, Any]]) -> Graded:
  """Grades the leaves that are this process's to grade."""
  leaves = np.flatnonzero(forest.leaf)
  leaves = leaves[hosts.share(len(leaves))]
  texts = run.task.texts([forest.response(leaf) for leaf in leaves])
  answers = [records[tree]["answer"] for tree in forest.tree[leaves]]
  return Graded(*run.task.grade(texts, answers, shaped=True))


def settle(run: Run, forest: Forest, own: Graded) -> tuple[np.ndarray, int]:
  """Rewards to train on, from what all processes have graded.

  Returns:
    ([N] float32, NaN at inner nodes; number of leaves that the grader failed on).
  """
  advantage = run.config.advantage
  rewards = np.full(len(forest.parent), np.nan, np.float32)
  leaves = int(forest.leaf.sum())
  rewards[forest.leaf] = hosts.join_shares(own.rewards, leaves)
  failed = hosts.join_shares(own.failed, leaves)
  if not advantage.grade_unfinished:
    cut_off = forest.leaf & ~forest.finished
    rewards = shape_unfinished(rewards, cut_off, advantage.unfinished_penalty)
  return rewards, int(failed.sum())


def disagree(run: Run, records: list[dict[str, Any]], trajectories: Forest) -> np.ndarray:
  """[R] bool, prompts whose trajectories differ in reward."""
  rewards, _ = settle(run, trajectories, grade_share(run, trajectories, records))
  leaves = np.flatnonzero(trajectories.leaf)
  least, most = np.full(len(records), np.inf), np.full(len(records), -np.inf)
  np.minimum.at(least, trajectories.tree[leaves], rewards[leaves])
  np.maximum.at(most, trajectories.tree[leaves], rewards[leaves])
  return most > least


def grow(
  run: Run, params: Any, prompts: strategies.Prompts, records: list[dict[str, Any]]
) -> Forest:
  """Samples the forest that the config asks for."""
  config, rollout = run.config, run.config.rollout
  sampler = run.sampler(temperature=rollout.temperature, as_rollout=True)
  if rollout.strategy != "chain":
    return strategies.grow_tree(
      sampler, params, prompts, branches=config.branches, budgets=config.budgets
    )
  return strategies.grow_chain(
    sampler,
    params,
    prompts,
    samples=rollout.samples,
    probes=rollout.probes,
    max_new_tokens=rollout.max_response_tokens,
    partition=run.partition(),
    cuts_per_group=rollout.cuts_per_group,
    probe=functools.partial(disagree, run, records) if rollout.probe_where == "mixed" else None,
  )
