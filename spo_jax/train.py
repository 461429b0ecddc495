"""Policy iteration: sample, grade, estimate, pack, update, evaluate, checkpoint."""

import contextlib
import dataclasses
import functools
import time
from typing import Any

import numpy as np

from spo_jax import rollouts
from spo_jax.data import source
from spo_jax.evaluation import evaluate
from spo_jax.forest import Forest
from spo_jax.infra.checkpoints import Checkpoints, Counters
from spo_jax.infra.compilation import Meter
from spo_jax.infra.metrics import MetricWriter
from spo_jax.infra.report import write_report
from spo_jax.learner import Learner, TrainingSet
from spo_jax.notices import Notices
from spo_jax.rewards import shape_unfinished
from spo_jax.run import Run
from spo_jax.sampling import strategies
from spo_jax.training.estimate import Estimate, estimate
from spo_jax.training.pairs import match_pairs
from spo_jax.training.replay import ReplayBuffer
from spo_jax.training.warm_start import warm_start
from spo_jax.training.weights import shares


def train(run: Run) -> Any:
  """Trains from the warm start, or from the run's newest checkpoint, to the last iteration.

  Returns:
    Parameters of the trained policy.
  """
  config = run.config
  iterator = source.make_iterator(
    run.task.split("train"),
    batch_size=config.rollout.prompts,
    seed=config.seed,
    replacement=config.data.replacement,
  )
  held = run.task.held_out(config.eval.split, config.eval.prompts)
  learner = Learner(run, warm_start(run))
  buffer = None
  if config.replay.max_age:
    buffer = ReplayBuffer(
      max_age=config.replay.max_age,
      segments_per_question=config.replay.segments_per_question,
    )
  counters = Counters()
  notices = Notices(run.progress.note)
  checkpoints = Checkpoints(run.workdir / "checkpoints", keep=config.checkpoint.keep)
  with MetricWriter(run.workdir) as writer, contextlib.closing(checkpoints):
    if (latest := checkpoints.latest()) is not None:
      arrays, record = checkpoints.restore(latest, learner.arrays())
      learner.load(arrays, record["learner"])
      if buffer is not None:
        buffer.restore(checkpoints.restore_host_arrays(latest))
      counters = Counters(**record["counters"])
      iterator.set_state(record["iterator"])
      writer.restore(record["metrics"])
      run.progress.note(f"resumed after iteration {counters.iteration}")
    else:
      writer.clear()
    clock, meter = Clock(counters.elapsed_s), Meter()
    if counters.iteration == 0:
      metrics = evaluate(run, learner.params, held)
      log(run, writer, counters, clock, metrics | meter.read())

    while counters.iteration < config.iterations:
      counters.iteration += 1
      records = next(iterator)
      forest, rewards, sampling_metrics = sample(run, learner.params, records)
      estimated = estimate(
        forest, rewards, config.advantage, probed=config.rollout.strategy == "chain"
      )
      chosen, replay_metrics = choose(
        run, counters.iteration, records, forest, rewards, estimated, buffer
      )
      metrics = {**sampling_metrics, **replay_metrics, **learner.update(chosen)}
      counters.tokens_sampled += int(forest.lengths[forest.depth > 0].sum())
      counters.tokens_trained += int(metrics["train/tokens"])
      last = counters.iteration == config.iterations
      if last or counters.iteration % config.eval.every == 0:
        metrics |= evaluate(run, learner.params, held)
      if last or counters.iteration == 1 or counters.iteration % config.eval.every == 0:
        rollouts.save(run, counters.iteration, forest, rewards, estimated, records)
      log(run, writer, counters, clock, metrics | meter.read())
      notices.look(config, counters.iteration, forest, rewards, metrics)
      if last or counters.iteration % config.checkpoint.every == 0:
        record = {
          "counters": dataclasses.asdict(counters),
          "iterator": iterator.get_state(),
          "learner": learner.record(),
          "metrics": writer.position(),
        }
        waiting = None if buffer is None else buffer.state()
        checkpoints.save(counters.iteration, learner.arrays(), record, waiting)
  run.progress.note(f"report: {write_report(run.workdir)}")
  return learner.params


def sample(
  run: Run, params: Any, records: list[dict[str, Any]]
) -> tuple[Forest, np.ndarray, dict[str, float]]:
  """Samples a forest for a batch of prompts and grades its leaves.

  Returns:
    (forest, rewards [N] to train on with NaN at inner nodes, metrics).
  """
  began = time.perf_counter()
  with run.progress.bar("rollout", total=2) as advance:
    forest = grow(run, params, run.task.prompts(records, run.key("rollout"), "ordinal"), records)
    advance(1)
    sampled = time.perf_counter()
    rewards, failed = grade(run, forest, records)
    advance(1)
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


def grade(run: Run, forest: Forest, records: list[dict[str, Any]]) -> tuple[np.ndarray, int]:
  """Rewards to train on.

  Returns:
    ([N] float32, NaN at inner nodes; number of leaves that the grader failed on).
  """
  advantage = run.config.advantage
  leaves = np.flatnonzero(forest.leaf)
  rewards = np.full(len(forest.parent), np.nan, np.float32)
  texts = run.task.texts([forest.response(leaf) for leaf in leaves])
  answers = [records[tree]["answer"] for tree in forest.tree[leaves]]
  rewards[leaves], failed = run.task.grade(texts, answers, shaped=True)
  if not advantage.grade_unfinished:
    cut_off = forest.leaf & ~forest.finished
    rewards = shape_unfinished(rewards, cut_off, advantage.unfinished_penalty)
  return rewards, int(failed.sum())


def disagree(run: Run, records: list[dict[str, Any]], trajectories: Forest) -> np.ndarray:
  """[R] bool, prompts whose trajectories differ in reward."""
  rewards, _ = grade(run, trajectories, records)
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


def choose(
  run: Run,
  iteration: int,
  records: list[dict[str, Any]],
  forest: Forest,
  rewards: np.ndarray,
  estimated: Estimate,
  buffer: ReplayBuffer | None,
) -> tuple[TrainingSet, dict[str, float]]:
  """What to train: the segments with a signal, those drawn from the buffer, or pairs of responses.

  Returns:
    (training set, metrics of the buffer).
  """
  if run.config.loss.kind == "dpo_positive":
    pairs = match_pairs(forest, rewards)
    in_pair = np.isin(np.arange(len(rewards)), pairs)
    return TrainingSet(forest, estimated.advantages, in_pair, pairs), {}
  if buffer is None:
    return TrainingSet(forest, estimated.advantages, estimated.trained), {}
  questions = np.asarray([int(record["index"]) for record in records], np.int64)
  buffer.add(iteration, forest, questions, estimated.advantages, estimated.trained)
  drawn = buffer.draw(iteration, np.random.default_rng((run.config.seed, iteration)))
  return TrainingSet(*drawn), {
    "replay/waiting": len(buffer),
    "replay/expired": buffer.expired,
  }


class Clock:
  """Seconds of a run, over all its processes."""

  def __init__(self, before: float):
    self._before, self._began = before, time.perf_counter()

  def __call__(self) -> float:
    return self._before + time.perf_counter() - self._began


def log(
  run: Run, writer: MetricWriter, counters: Counters, clock: Clock, metrics: dict[str, float]
) -> None:
  """Writes and shows one line of metrics."""
  counters.elapsed_s = clock()
  line = {
    "iteration": counters.iteration,
    **metrics,
    "tokens/sampled": counters.tokens_sampled,
    "tokens/trained": counters.tokens_trained,
    "time/elapsed_s": counters.elapsed_s,
  }
  writer.write(line)
  run.progress.summary(line)
