"""Accuracy of a policy on a fixed set of problems: sampled and greedy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from spo_jax.run import Run
from spo_jax.sampling.strategies import grow_tree


def held_out(run: Run, split: str, count: int) -> list[dict[str, Any]]:
  """The first `count` records of a split, or all of them if there are fewer."""
  records = run.split(split)
  return [records[i] for i in range(min(count, len(records)))]


def accuracy(
  run: Run, params: Any, records: Sequence[dict[str, Any]], *, temperature: float
) -> float:
  """Share of problems that one response each solves; temperature 0 is greedy.

  A problem's random numbers depend on its id alone, so evaluations of one set differ by the policy
  only.
  """
  sampler = run.sampler(temperature=temperature, truncate=False)
  prompts = run.prompts(records, run.key("eval"), "id")
  budget = run.config.rollout.max_response_tokens
  forest = grow_tree(sampler, params, prompts, branches=(1,), budgets=(budget,))
  leaves = np.flatnonzero(forest.leaf)
  rewards, _ = run.grade(forest, records, leaves)
  return float(np.mean(rewards))


def evaluate(run: Run, params: Any, records: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Evaluation metrics of a policy."""
  with run.progress.bar("evaluation", total=2) as advance:
    sampled = accuracy(run, params, records, temperature=run.config.rollout.temperature)
    advance(1)
    greedy = accuracy(run, params, records, temperature=0.0)
    advance(1)
  return {"eval/accuracy": sampled, "eval/accuracy_greedy": greedy}
