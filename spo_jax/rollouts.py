"""Rollout trees for reading: one prompt's tree with text, values and advantages, as JSON."""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from spo_jax.forest import Forest
from spo_jax.run import Run
from spo_jax.training.estimate import Estimate

FOLDER = "rollouts"


def save(
  run: Run,
  iteration: int,
  forest: Forest,
  rewards: np.ndarray,
  estimated: Estimate,
  records: Sequence[dict[str, Any]],
) -> None:
  """Writes the tree with most trained segments to last.json, and at iteration 1 to first.json."""
  tree = int(np.argmax(np.bincount(forest.tree, weights=estimated.trained)))
  rollout = {
    "iteration": iteration,
    "method": run.config.rollout.strategy,
    "threshold": run.config.probability_threshold,
    "prompt": records[tree]["question"],
    "answer": records[tree]["answer"],
    "nodes": _nodes(run, forest, rewards, estimated, tree),
  }
  folder = run.workdir / FOLDER
  folder.mkdir(exist_ok=True)
  for name in ("first", "last") if iteration == 1 else ("last",):
    unfinished = folder / f"{name}.json.tmp"
    unfinished.write_text(json.dumps(rollout))
    os.replace(unfinished, folder / f"{name}.json")


def _nodes(run: Run, forest: Forest, rewards, estimated: Estimate, tree: int):
  members = np.flatnonzero(forest.tree == tree)
  number = {int(node): i for i, node in enumerate(members)}
  leaf = forest.leaf
  nodes = []
  for node in members:
    tokens = forest.node_tokens(node)
    begin, end = forest.offsets[node : node + 2]
    root = forest.parent[node] < 0
    nodes.append(
      {
        "parent": -1 if root else number[int(forest.parent[node])],
        "tokens": _pieces(run.task.tokenizer, tokens),
        "probs": [] if root else np.exp(forest.logprobs[begin:end]).round(4).tolist(),
        "value": float(estimated.values[node]) if estimated.known[node] else None,
        "advantage": None if root or forest.probe[node] else float(estimated.advantages[node]),
        "reward": float(rewards[node]) if leaf[node] else None,
        "finished": bool(forest.finished[node]),
        "probe": bool(forest.probe[node]),
      }
    )
  return nodes


def _pieces(tokenizer, tokens: np.ndarray) -> list[str]:
  """Text of each token within its segment: what decoding grows by, or a special token's name."""
  pieces, text = [], ""
  for end in range(1, len(tokens) + 1):
    grown = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    special = int(tokens[end - 1]) in tokenizer.all_special_ids
    pieces.append(tokenizer.decode(tokens[end - 1 : end]) if special else grown[len(text) :])
    text = grown
  return pieces
