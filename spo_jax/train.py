"""Policy iteration: sample, grade, estimate, pack, update, evaluate, checkpoint."""

import contextlib
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax import rollouts
from spo_jax.algorithms.partition import make_partition
from spo_jax.config import Config
from spo_jax.data import source
from spo_jax.evaluation import evaluate
from spo_jax.forest import Forest
from spo_jax.infra.checkpoints import Checkpoints, Counters
from spo_jax.infra.mesh import shard_batch
from spo_jax.infra.metrics import MetricWriter
from spo_jax.infra.report import write_report
from spo_jax.notices import Notices
from spo_jax.rewards import shape_unfinished
from spo_jax.run import Run, delimiter_ids
from spo_jax.sampling import strategies
from spo_jax.training import packing
from spo_jax.training.estimate import Estimate, estimate
from spo_jax.training.step import LossConfig, TrainState, init_state, prepare, train_step
from spo_jax.training.warm_start import warm_start

NO_TOKENS_WEIGHT = 1e-9  # of an optimiser step without tokens in the metrics' means


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
  params = warm_start(run)
  # A copy: training donates its parameters, the reference policy keeps its own.
  ref_params = jax.tree.map(jnp.copy, params) if config.loss.kl_coef else None
  state = init_state(params, config.optimizer)
  del params
  counters = Counters()
  notices = Notices(run.progress.note)
  checkpoints = Checkpoints(run.workdir / "checkpoints", keep=config.checkpoint.keep)
  with MetricWriter(run.workdir) as writer, contextlib.closing(checkpoints):
    if (latest := checkpoints.latest()) is not None:
      state, record = checkpoints.restore(latest, state)
      counters = Counters(**record["counters"])
      iterator.set_state(record["iterator"])
      writer.restore(record["metrics"])
      run.progress.note(f"resumed after iteration {counters.iteration}")
    else:
      writer.clear()
    clock = Clock(counters.elapsed_s)
    if counters.iteration == 0:
      log(run, writer, counters, clock, evaluate(run, state.params, held))

    while counters.iteration < config.iterations:
      counters.iteration += 1
      records = next(iterator)
      forest, rewards, sampling_metrics = sample(run, state.params, records)
      estimated = estimate(
        forest, rewards, config.advantage, probed=config.rollout.strategy == "chain"
      )
      state, update_metrics = update(run, state, ref_params, forest, estimated)

      metrics = {**sampling_metrics, **update_metrics}
      counters.tokens_sampled += int(forest.lengths[forest.depth > 0].sum())
      counters.tokens_trained += int(metrics["train/tokens"])
      last = counters.iteration == config.iterations
      if last or counters.iteration % config.eval.every == 0:
        metrics |= evaluate(run, state.params, held)
      if last or counters.iteration == 1 or counters.iteration % config.eval.every == 0:
        rollouts.save(run, counters.iteration, forest, rewards, estimated, records)
      log(run, writer, counters, clock, metrics)
      notices.look(config, counters.iteration, forest, rewards, metrics)
      if last or counters.iteration % config.checkpoint.every == 0:
        record = {
          "counters": dataclasses.asdict(counters),
          "iterator": iterator.get_state(),
          "metrics": writer.position(),
        }
        checkpoints.save(counters.iteration, state, record)
  run.progress.note(f"report: {write_report(run.workdir)}")
  return state.params


def sample(
  run: Run, params: Any, records: list[dict[str, Any]]
) -> tuple[Forest, np.ndarray, dict[str, float]]:
  """Samples a forest for a batch of prompts and grades its leaves.

  Returns:
    (forest, rewards [N] to train on with NaN at inner nodes, metrics).
  """
  config = run.config
  began = time.perf_counter()
  with run.progress.bar("rollout", total=2) as advance:
    forest = grow(run, params, run.task.prompts(records, run.key("rollout"), "ordinal"))
    advance(1)
    sampled = time.perf_counter()
    leaves = np.flatnonzero(forest.leaf)
    rewards = np.full(len(forest.parent), np.nan, np.float32)
    texts = run.task.texts([forest.response(leaf) for leaf in leaves])
    answers = [records[tree]["answer"] for tree in forest.tree[leaves]]
    rewards[leaves], failed = run.task.grade(texts, answers, shaped=True)
    if not config.advantage.grade_unfinished:
      cut_off = forest.leaf & ~forest.finished
      rewards = shape_unfinished(rewards, cut_off, config.advantage.unfinished_penalty)
    advance(1)
  own = leaves[~forest.probe[leaves]]
  path_tokens = [len(forest.response(leaf)) for leaf in own]
  return (
    forest,
    rewards,
    {
      "train/reward_mean": _tree_mean(forest, rewards, own),
      "train/finished": float(np.mean(forest.finished[own])),
      "train/response_tokens": float(np.mean(path_tokens)),
      "train/grader_failures": int(failed.sum()),
      "time/rollout_s": sampled - began,
      "time/grade_s": time.perf_counter() - sampled,
    },
  )


def _tree_mean(forest: Forest, rewards: np.ndarray, leaves: np.ndarray) -> float:
  """Mean over leaves, each weighing 1 / children at each of its ancestors: V of the prompts."""
  children = np.bincount(forest.parent[(forest.depth > 0) & ~forest.probe], minlength=len(rewards))
  weight = np.ones(len(rewards))
  for node in np.flatnonzero(forest.depth > 0):
    parent = forest.parent[node]
    weight[node] = weight[parent] / max(children[parent], 1)
  return float(np.average(rewards[leaves], weights=weight[leaves]))


def grow(run: Run, params: Any, prompts: strategies.Prompts) -> Forest:
  """Samples the forest that the config asks for."""
  config, rollout = run.config, run.config.rollout
  sampler = run.sampler(temperature=rollout.temperature, truncate=True)
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
    partition=make_partition(
      config.partition.kind,
      threshold=config.probability_threshold,
      interval=config.partition.interval,
      length=config.partition.length,
      delimiter_ids=delimiter_ids(run.task.tokenizer, config.partition.delimiter),
    ),
    cuts_per_group=rollout.cuts_per_group,
  )


def update(
  run: Run, state: TrainState, ref_params: Any, forest: Forest, estimated: Estimate
) -> tuple[TrainState, dict[str, float]]:
  """Packs the trained segments and takes the iteration's optimiser steps."""
  config = run.config
  began = time.perf_counter()
  packed, counts = packing.pack(
    forest, estimated.advantages, estimated.trained, pack_config(config)
  )
  used = counts["micro_batches"]
  packed_at = time.perf_counter()
  loss_cfg = loss_config(config)
  batch = prepare(run.model, loss_cfg, ref_params, shard_batch(run.mesh, packed), jnp.int32(used))
  edges = np.linspace(0, used, config.minibatches + 1).astype(np.int32)
  spans = list(zip(edges[:-1], edges[1:], strict=True)) * config.epochs
  steps = []
  with run.progress.bar("update", total=len(spans)) as advance:
    for start, stop in spans:
      state, metrics = train_step(
        run.model,
        loss_cfg,
        config.optimizer,
        state,
        batch,
        jnp.int32(start),
        jnp.int32(stop - start),
      )
      steps.append(metrics)
      advance(1)
    steps = jax.device_get(steps)
  weights = np.maximum([step["tokens"] for step in steps], NO_TOKENS_WEIGHT)
  mean = {
    name: float(np.average([step[name] for step in steps], weights=weights)) for name in steps[0]
  }
  trained = estimated.advantages[estimated.trained]
  return state, {
    **{f"train/{name}": value for name, value in mean.items() if name != "tokens"},
    "train/tokens": float(sum(step["tokens"] for step in steps)),
    "train/segments": counts["segments"],
    "train/segments_sampled": int(np.sum((forest.depth > 0) & ~forest.probe)),
    "train/advantage_abs": float(np.mean(np.abs(trained))) if len(trained) else 0.0,
    "train/packed_tokens": counts["packed_tokens"],
    "train/copies": counts["packed_tokens"] / max(1, counts["distinct_tokens"]),
    "train/row_fill": counts["packed_tokens"] / max(1, counts["rows"] * config.packing.row_length),
    "time/pack_s": packed_at - began,
    "time/update_s": time.perf_counter() - packed_at,
  }


def pack_config(config: Config) -> packing.PackConfig:
  """The shape of the packed batch, fixed for the whole run."""
  rows = config.packing
  shape = packing.PackConfig(rows.row_length, rows.rows, rows.query_block, rows.key_block)
  return packing.with_room(
    shape, config.longest_segments, config.longest_tree, config.rollout.prompts
  )


def loss_config(config: Config) -> LossConfig:
  """The fields of the loss, from where the config keeps them."""
  return LossConfig(
    temperature=config.rollout.temperature,
    probability_threshold=config.probability_threshold,
    logprob_chunk=config.packing.logprob_chunk,
    **dataclasses.asdict(config.loss),
  )


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
