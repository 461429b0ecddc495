"""Responses to a fixed set of problems, and the share of them that are right."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from spo_jax.forest import Forest
from spo_jax.infra.mesh import row_shards
from spo_jax.run import Run
from spo_jax.sampling.sampler import Sampler
from spo_jax.sampling.strategies import grow_tree
from spo_jax.task import Task, grade_together


def respond(
  task: Task,
  sampler: Sampler,
  params: Any,
  records: Sequence[dict[str, Any]],
  key: jax.Array,
  *,
  samples: int,
  max_new_tokens: int,
  batch: int,
) -> Iterator[tuple[Sequence[dict[str, Any]], Forest, np.ndarray]]:
  """Samples responses to problems, a batch at a time.

  A problem's random numbers depend on its id alone, so evaluations of one set differ by the policy
  only. The last batch is filled up with its own problems again, so that all are compiled once.

  Args:
    task: what is asked.
    sampler: the compiled verbs.
    params: parameters of the policy.
    records: R problems.
    key: root of the random numbers.
    samples: responses a problem.
    max_new_tokens: longest response.
    batch: problems that are prefilled together.

  Yields:
    (b problems, the forest of their responses, [b, samples] ids of its leaves).
  """
  shards = row_shards(sampler.mesh)
  batch = min(batch, -(-len(records) // shards) * shards)
  for start in range(0, len(records), batch):
    chunk = records[start : start + batch]
    filled = [chunk[i % len(chunk)] for i in range(batch)]
    prompts = task.prompts(filled, key, "id")
    forest = grow_tree(sampler, params, prompts, branches=(samples,), budgets=(max_new_tokens,))
    leaves = np.flatnonzero(forest.leaf).reshape(batch, samples)
    yield chunk, forest, leaves[: len(chunk)]


def accuracy(
  run: Run, params: Any, records: Sequence[dict[str, Any]], *, temperature: float
) -> float:
  """Share of problems that one response each solves; temperature 0 is greedy."""
  sampler = run.sampler(temperature=temperature, as_rollout=False)
  config = run.config
  solved = 0.0
  for chunk, forest, leaves in respond(
    run.task,
    sampler,
    params,
    records,
    run.key("eval"),
    samples=1,
    max_new_tokens=config.rollout.max_response_tokens,
    batch=config.eval.batch,
  ):
    texts = run.task.texts([forest.response(leaf) for leaf in leaves[:, 0]])
    rewards, _ = grade_together(run.task, texts, [record["answer"] for record in chunk])
    solved += float(rewards.sum())
  return solved / len(records)


def evaluate(run: Run, params: Any, records: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Evaluation metrics of a policy in training: sampled as rollouts are, and greedy."""
  with run.progress.bar("evaluation", total=2) as advance:
    sampled = accuracy(run, params, records, temperature=run.config.rollout.temperature)
    advance(1)
    greedy = accuracy(run, params, records, temperature=0.0)
    advance(1)
  return {"eval/accuracy": sampled, "eval/accuracy_greedy": greedy}
