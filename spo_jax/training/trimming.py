"""What the loss does not read need not be packed: segments without an unlikely token, and whatever
follows the last one of a segment that no trained segment continues.

With the probability mask most tokens of a response are of no use to the update: a policy that is
sure of a calculation's digits leaves one token in ten or twenty. The gradient stays what it was.
"""

import jax
import numpy as np

from spo_jax.algorithms.masking import probability_mask
from spo_jax.config import Config
from spo_jax.forest import Forest, shorten


def trim(forest: Forest, trained: np.ndarray, config: Config) -> tuple[Forest, np.ndarray]:
  """Cuts off what the loss of `config` does not read.

  Args:
    forest: N nodes.
    trained: [N] bool, segments that enter the loss.
    config: the run.

  Returns:
    (the forest of the same N nodes with fewer tokens, [N] bool segments with tokens in the loss).
  """
  if not reads_unlikely_alone(config):
    return forest, trained
  needed = loss_lengths(forest, trained, config)
  inner = np.zeros(len(trained), bool)  # what a segment with tokens in the loss continues
  for node in np.flatnonzero(needed)[::-1]:
    above = forest.parent[node]
    while above >= 0 and not inner[above]:
      inner[above] = True
      above = forest.parent[above]
  kept = np.where(inner, forest.lengths, needed)
  return shorten(forest, kept), trained & (needed > 0)


def reads_unlikely_alone(config: Config) -> bool:
  """Whether nothing in the loss depends on the other tokens of trained segments.

  A critic learns from all of them, "rescale" takes the deviation over them, and DPO-positive sums
  their log-probs.
  """
  loss = config.loss
  return (
    loss.use_probability_mask
    and config.critic.trunk == "none"
    and loss.scaling != "rescale"
    and loss.kind != "dpo_positive"
  )


def read_tokens(forest: Forest, trained: np.ndarray, config: Config) -> np.ndarray | None:
  """[tokens] bool, those that the loss of `config` reads; None where that may be all of them."""
  return loss_tokens(forest, trained, config) if reads_unlikely_alone(config) else None


def loss_tokens(forest: Forest, trained: np.ndarray, config: Config) -> np.ndarray:
  """[tokens] bool, unlikely tokens of trained segments."""
  mask = np.repeat(trained, forest.lengths)[None]
  mask = probability_mask(forest.logprobs[None], mask, threshold=config.probability_threshold)
  return jax.device_get(mask)[0]


def loss_lengths(forest: Forest, trained: np.ndarray, config: Config) -> np.ndarray:
  """[N] int64, tokens of each node up to its last one in the loss; 0 if it has none."""
  lengths = forest.lengths
  node = np.repeat(np.arange(len(lengths)), lengths)
  (last,) = np.nonzero(loss_tokens(forest, trained, config))
  found = np.zeros(len(lengths), np.int64)
  np.maximum.at(found, node[last], last + 1 - forest.offsets[node[last]])
  return found
