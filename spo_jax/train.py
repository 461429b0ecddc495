"""Policy iteration: sample, grade, estimate, pack, update, evaluate, checkpoint."""

import contextlib
import dataclasses
import time
from collections.abc import Collection
from typing import Any

import numpy as np

from spo_jax import rollouts
from spo_jax.batches import Batches
from spo_jax.config import Config
from spo_jax.errors import Stopped, UserError
from spo_jax.evaluation import evaluate
from spo_jax.forest import Forest
from spo_jax.infra import hosts, profiling, speed, stopping
from spo_jax.infra.checkpoints import Checkpoints, Counters
from spo_jax.infra.compilation import Meter
from spo_jax.infra.metrics import MetricWriter, NoWriter
from spo_jax.infra.report import write_report
from spo_jax.infra.sinks import open_sinks
from spo_jax.learner import Learner, TrainingSet
from spo_jax.models.decoder import weights_per_token
from spo_jax.notices import Notices
from spo_jax.run import Run
from spo_jax.training.estimate import Estimate, estimate
from spo_jax.training.pairs import match_pairs
from spo_jax.training.replay import ReplayBuffer
from spo_jax.training.warm_start import warm_start


def train(run: Run, profile: Collection[int] = ()) -> Any:
  """Trains from the warm start, or from the run's newest checkpoint, to the last iteration.

  Args:
    run: what to train.
    profile: iterations that are traced; see `infra/profiling.py`.

  Returns:
    Parameters of the trained policy.

  Raises:
    Stopped: if the process was asked to end; all is saved.
    UserError: if updates have no effect or the grader fails on all, a checkpoint cannot be read or
      written, or Weights & Biases is asked for and cannot be used.
  """
  config, counters = run.config, Counters()
  sinks = hosts.first_then_all(
    lambda: open_sinks(run.workdir, config.wandb) if hosts.is_first() else []
  )
  batches = Batches(run)
  held = run.task.held_out(config.eval.split, config.eval.prompts)
  learner = Learner(run, warm_start(run))
  buffer = None
  if config.replay.max_age:
    buffer = ReplayBuffer(
      max_age=config.replay.max_age,
      segments_per_question=config.replay.segments_per_question,
    )
  notices = Notices(run.progress.note)
  keeps = buffer is not None or config.rollout.ahead
  checkpoints = Checkpoints(
    run.checkpoint_folder("checkpoints"),
    keep=config.checkpoint.keep,
    keep_best=config.checkpoint.keep_best,
  )

  def read(step: int):
    waiting = checkpoints.restore_host_arrays(step) if keeps else {}
    return (*checkpoints.restore(step, learner.arrays()), waiting)

  writer = MetricWriter(run.workdir, sinks) if hosts.is_first() else NoWriter()
  with writer, contextlib.closing(checkpoints):
    if (newest := checkpoints.read_newest(read, run.progress.note)) is not None:
      arrays, record, waiting = newest
      learner.load(arrays, record["learner"])
      if buffer is not None:
        buffer.restore(waiting)
      batches.restore(record, waiting)
      counters = Counters(**record["counters"])
      writer.restore(record["metrics"])
      run.progress.note(f"resumed after iteration {counters.iteration}")
    else:
      writer.clear()
    clock, meter = Clock(counters.elapsed_s), Meter()
    saved_at, unsound = time.monotonic(), 0
    if counters.iteration == 0:
      metrics = evaluate(run, learner.params, held)
      log(run, writer, counters, clock, metrics | meter.read())

    while counters.iteration < config.iterations:
      counters.iteration += 1
      began = time.perf_counter()
      with profiling.trace(run.workdir, counters.iteration, profile):
        records, forest, rewards, sampling_metrics = batches.take(learner.params)
        estimated = estimate(
          forest, rewards, config.advantage, probed=config.rollout.strategy == "chain"
        )
        chosen, replay_metrics = choose(
          run, counters.iteration, records, forest, rewards, estimated, buffer
        )
        with batches.ahead(learner):
          metrics = {**sampling_metrics, **replay_metrics, **learner.update(chosen)}
        counters.trained_s += time.perf_counter() - began
      sampled = int(forest.lengths[forest.depth > 0].sum())
      counters.tokens_sampled += sampled
      counters.tokens_trained += int(metrics["train/tokens"])
      metrics |= speed.measure(
        metrics,
        trained_s=counters.trained_s,
        began_at=counters.began_at,
        sampled=sampled,
        weights=weights_per_token(run.model, learner.params),
        epochs=config.epochs,
        devices=run.mesh.devices.flat,
      )
      last = counters.iteration == config.iterations
      if last or counters.iteration % config.eval.every == 0:
        metrics |= evaluate(run, learner.params, held)
      shown = last or counters.iteration == 1 or counters.iteration % config.eval.every == 0
      if shown and hosts.is_first():
        rollouts.save(run, counters.iteration, forest, rewards, estimated, records)
      log(run, writer, counters, clock, metrics | meter.read())
      notices.look(config, counters.iteration, forest, rewards, metrics)
      reason = why_unsound(config, int(forest.leaf.sum()), metrics)
      unsound = unsound + 1 if reason else 0
      if unsound >= config.unstable_limit:
        raise UserError(
          f"no update of the last {unsound} iterations was sound: stopped at iteration "
          f"{counters.iteration}, of which nothing is saved; {reason}"
        )
      stop, overdue = hosts.any_of_each(
        stopping.asked(), time.monotonic() - saved_at > config.checkpoint.every_s
      )
      due = last or stop or overdue or counters.iteration % config.checkpoint.every == 0
      if due and not unsound:
        save(checkpoints, counters, learner, batches, buffer, writer, metrics)
        saved_at = time.monotonic()
      if stop and not last:
        checkpoints.wait()
        raise Stopped(f"stopped after iteration {counters.iteration} of {config.iterations}")
  if hosts.is_first():
    run.progress.note(f"report: {write_report(run.workdir)}")
  return learner.params


def save(
  checkpoints: Checkpoints,
  counters: Counters,
  learner: Learner,
  batches: Batches,
  buffer: ReplayBuffer | None,
  writer: MetricWriter | NoWriter,
  metrics: dict[str, float],
) -> None:
  """Begins to write a checkpoint of all that the next iterations depend on."""
  record = {
    "counters": dataclasses.asdict(counters),
    "learner": learner.record(),
    "metrics": writer.position(),
    **batches.record(),
  }
  waiting = batches.arrays() | ({} if buffer is None else buffer.state())
  checkpoints.save(
    counters.iteration, learner.arrays(), record, waiting or None, metrics.get("eval/accuracy")
  )


def why_unsound(config: Config, leaves: int, metrics: dict[str, float]) -> str | None:
  """Why an iteration is nothing to go on from, and what can be done about it; None if it is sound.

  Args:
    config: of the run.
    leaves: responses that were graded.
    metrics: of the iteration.
  """
  if metrics["train/grader_failures"] == leaves:
    return (
      f"config.data.grader '{config.data.grader}' failed on all of the last {leaves} responses; "
      "when it works again, the same command resumes"
    )
  if metrics["train/unstable"] == 1:
    return (
      f"gradient norm {metrics['train/grad_norm']:.3g}, mean ratio {metrics['train/ratio']:.3g}; "
      "lower config.optimizer.learning_rate or config.optimizer.clip_norm, in a new workdir, or "
      "look at the rollouts"
    )
  return None


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
