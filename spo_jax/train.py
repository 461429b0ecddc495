"""Policy iteration: sample, grade, estimate, pack, update, evaluate, checkpoint."""

import contextlib
import dataclasses
import time
from collections.abc import Collection
from typing import Any, NamedTuple

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


class Iteration(NamedTuple):
  """What an iteration has done."""

  records: list[dict[str, Any]]  # R prompts
  forest: Forest  # N nodes
  rewards: np.ndarray  # [N] float32, NaN at inner nodes
  estimated: Estimate
  metrics: dict[str, float]


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
  config = run.config
  sinks = hosts.first_then_all(
    lambda: open_sinks(run.workdir, config.wandb) if hosts.is_first() else []
  )
  held = run.task.held_out(config.eval.split, config.eval.prompts)
  notices = Notices(run.progress.note)
  training = Training(run)
  writer = MetricWriter(run.workdir, sinks) if hosts.is_first() else NoWriter()
  with writer, contextlib.closing(training):
    training.resume(writer)
    clock, meter = Clock(training.counters.elapsed_s), Meter()
    saved_at, unsound = time.monotonic(), 0
    if training.counters.iteration == 0:
      metrics = evaluate(run, training.params, held)
      log(run, writer, training.counters, clock, metrics | meter.read())

    while training.counters.iteration < config.iterations:
      done = training.iterate(profile)
      iteration, metrics = training.counters.iteration, done.metrics
      last = iteration == config.iterations
      if last or iteration % config.eval.every == 0:
        metrics |= evaluate(run, training.params, held)
      shown = last or iteration == 1 or iteration % config.eval.every == 0
      if shown and hosts.is_first():
        rollouts.save(run, iteration, done.forest, done.rewards, done.estimated, done.records)
      log(run, writer, training.counters, clock, metrics | meter.read())
      notices.look(config, iteration, done.forest, done.rewards, metrics)
      reason = why_unsound(config, done.forest, metrics)
      unsound = unsound + 1 if reason else 0
      if unsound >= config.unstable_limit:
        raise UserError(
          f"no update of the last {unsound} iterations was sound: stopped at iteration "
          f"{iteration}, of which nothing is saved; {reason}"
        )
      stop, overdue = hosts.any_of_each(
        stopping.asked(), time.monotonic() - saved_at > config.checkpoint.every_s
      )
      due = last or stop or overdue or iteration % config.checkpoint.every == 0
      if due and not unsound:
        training.save(metrics, writer.position())
        saved_at = time.monotonic()
      if stop and not last:
        training.wait()
        raise Stopped(f"stopped after iteration {iteration} of {config.iterations}")
  if hosts.is_first():
    run.progress.note(f"report: {write_report(run.workdir)}")
  return training.params


class Training:
  """What the iterations of a run change; all of it is in its checkpoints."""

  def __init__(self, run: Run):
    """Begins with the warm start."""
    config = run.config
    self._run = run
    self.counters = Counters()
    self._batches = Batches(run)
    self._learner = Learner(run, warm_start(run))
    self._buffer = None
    if config.replay.max_age:
      self._buffer = ReplayBuffer(
        max_age=config.replay.max_age,
        segments_per_question=config.replay.segments_per_question,
      )
    self._checkpoints = Checkpoints(
      run.checkpoint_folder("checkpoints"),
      keep=config.checkpoint.keep,
      keep_best=config.checkpoint.keep_best,
    )

  @property
  def params(self) -> Any:
    """Parameters of the policy."""
    return self._learner.params

  def resume(self, writer: MetricWriter | NoWriter) -> None:
    """Takes up, with the metrics, where the newest checkpoint was made that can be read, if any."""
    keeps = self._buffer is not None or self._run.config.rollout.ahead

    def read(step: int):
      waiting = self._checkpoints.restore_host_arrays(step) if keeps else {}
      return (*self._checkpoints.restore(step, self._learner.arrays()), waiting)

    note = self._run.progress.note
    if (newest := self._checkpoints.read_newest(read, note)) is None:
      writer.clear()
      return
    arrays, record, waiting = newest
    self._learner.load(arrays, record["learner"])
    if self._buffer is not None:
      self._buffer.restore(waiting)
    self._batches.restore(record, waiting)
    self.counters = Counters(**record["counters"])
    writer.restore(record["metrics"])
    note(f"resumed after iteration {self.counters.iteration}")

  def iterate(self, profile: Collection[int]) -> Iteration:
    """Samples a batch, estimates its advantages and updates the policy."""
    run, counters, learner = self._run, self.counters, self._learner
    config = run.config
    counters.iteration += 1
    began = time.perf_counter()
    with profiling.trace(run.workdir, counters.iteration, profile):
      records, forest, rewards, metrics = self._batches.take(learner.params)
      estimated = estimate(
        forest, rewards, config.advantage, probed=config.rollout.strategy == "chain"
      )
      chosen, of_buffer = choose(
        run, counters.iteration, records, forest, rewards, estimated, self._buffer
      )
      with self._batches.ahead(learner):
        metrics = {**metrics, **of_buffer, **learner.update(chosen)}
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
    return Iteration(records, forest, rewards, estimated, metrics)

  def save(self, metrics: dict[str, float], position: dict[str, int | str]) -> None:
    """Begins to write a checkpoint of all that the next iterations depend on.

    Args:
      metrics: of the last iteration.
      position: of the writer of metrics.
    """
    record = {
      "counters": dataclasses.asdict(self.counters),
      "learner": self._learner.record(),
      "metrics": position,
      **self._batches.record(),
    }
    waiting = self._batches.arrays() | ({} if self._buffer is None else self._buffer.state())
    self._checkpoints.save(
      self.counters.iteration,
      self._learner.arrays(),
      record,
      waiting or None,
      metrics.get("eval/accuracy"),
    )

  def wait(self) -> None:
    """Waits until what was saved is on disk."""
    self._checkpoints.wait()

  def close(self) -> None:
    """Waits, and lets the checkpoints go."""
    self._checkpoints.close()


def why_unsound(config: Config, forest: Forest, metrics: dict[str, float]) -> str | None:
  """Why an iteration is nothing to go on from, and what can be done about it; None if it is sound.

  Args:
    config: of the run.
    forest: what it sampled.
    metrics: of the iteration.
  """
  leaves = int(forest.leaf.sum())
  if not np.isfinite(forest.logprobs).all():
    return (
      "the policy has parameters that are not finite; lower config.optimizer.learning_rate, in a "
      "new workdir"
    )
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
