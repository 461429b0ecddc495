"""Policy iteration: sample, grade, estimate, pack, update, evaluate, checkpoint."""

import contextlib
import dataclasses
import time
from typing import Any

import numpy as np

from spo_jax import rollouts
from spo_jax.batches import Batches
from spo_jax.evaluation import evaluate
from spo_jax.forest import Forest
from spo_jax.infra.checkpoints import Checkpoints, Counters
from spo_jax.infra.compilation import Meter
from spo_jax.infra.metrics import MetricWriter
from spo_jax.infra.report import write_report
from spo_jax.learner import Learner, TrainingSet
from spo_jax.notices import Notices
from spo_jax.run import Run
from spo_jax.training.estimate import Estimate, estimate
from spo_jax.training.pairs import match_pairs
from spo_jax.training.replay import ReplayBuffer
from spo_jax.training.warm_start import warm_start


def train(run: Run) -> Any:
  """Trains from the warm start, or from the run's newest checkpoint, to the last iteration.

  Returns:
    Parameters of the trained policy.
  """
  config = run.config
  batches = Batches(run)
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
      keeps = buffer is not None or config.rollout.ahead
      waiting = checkpoints.restore_host_arrays(latest) if keeps else {}
      if buffer is not None:
        buffer.restore(waiting)
      batches.restore(record, waiting)
      counters = Counters(**record["counters"])
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
      records, forest, rewards, sampling_metrics = batches.take(learner.params)
      estimated = estimate(
        forest, rewards, config.advantage, probed=config.rollout.strategy == "chain"
      )
      chosen, replay_metrics = choose(
        run, counters.iteration, records, forest, rewards, estimated, buffer
      )
      with batches.ahead(learner):
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
          "learner": learner.record(),
          "metrics": writer.position(),
          **batches.record(),
        }
        waiting = batches.arrays() | ({} if buffer is None else buffer.state())
        checkpoints.save(counters.iteration, learner.arrays(), record, waiting or None)
  run.progress.note(f"report: {write_report(run.workdir)}")
  return learner.params


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
