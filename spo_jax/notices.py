"""What a person is told, once, of an iteration that trains nothing, or passes tokens through the
model several times: that it is so, and why."""

from collections.abc import Callable, Mapping

import numpy as np

from spo_jax.config import Config
from spo_jax.forest import Forest

MANY_COPIES = 1.5  # of a token on average, from which on longer rows are worth a word


class Notices:
  """Tells each reason once in the life of a process, however many iterations it holds.

  Args:
    note: shows a line.
  """

  def __init__(self, note: Callable[[str], None]):
    self._note = note
    self._told: set[str] = set()

  def look(
    self,
    config: Config,
    iteration: int,
    forest: Forest,
    rewards: np.ndarray,
    metrics: Mapping[str, float],
  ) -> None:
    """Tells what is amiss with an iteration, unless nothing is or it is known already.

    Args:
      config: of the run.
      iteration: its number.
      forest: what was sampled, N nodes.
      rewards: [N] float32, read at the leaves.
      metrics: of the iteration.
    """
    if metrics["train/skipped"] == 1:
      reason, line = nothing_trained(config, forest, rewards, metrics)
      self._tell(reason, f"iteration {iteration} trains nothing: {line}")
    elif metrics["train/advantage_abs"] == 0 and config.critic.trunk == "none":
      reason, line = no_advantage(config, forest, rewards, metrics)
      self._tell(reason, f"iteration {iteration} has no advantage to train on: {line}")
    if metrics["train/copies"] > MANY_COPIES:
      self._tell(
        "copies",
        f"iteration {iteration} passes a token through the model {metrics['train/copies']:.1f} "
        f"times on average: rows of config.packing.row_length {config.packing.row_length} tokens "
        "hold few segments beside their ancestors; longer and fewer rows would do the same faster",
      )

  def _tell(self, reason: str, line: str) -> None:
    if reason not in self._told:
      self._told.add(reason)
      self._note(line)


def nothing_trained(
  config: Config, forest: Forest, rewards: np.ndarray, metrics: Mapping[str, float]
) -> tuple[str, str]:
  """Why no update of an iteration changed anything: (kind of reason, a line that tells it).

  Arguments are those of `Notices.look`.
  """
  if metrics["train/tokens"]:
    if metrics["train/ratio"] > config.loss.ratio_threshold:
      return "ratio", (
        f"the mean ratio to the sampling policy is {metrics['train/ratio']:.3g}, above "
        f"config.loss.ratio_threshold {config.loss.ratio_threshold:g}"
      )
    return "not finite", "the gradient is not finite"
  if metrics["train/segments"]:
    return "probable", (
      f"all tokens of the {metrics['train/segments']} segments with an advantage had a probability "
      f"of config.probability_threshold {config.probability_threshold:g} or more when sampled"
    )
  return no_advantage(config, forest, rewards, metrics)


def no_advantage(
  config: Config, forest: Forest, rewards: np.ndarray, metrics: Mapping[str, float]
) -> tuple[str, str]:
  """Why no segment has an advantage: (kind of reason, a line that tells it).

  Arguments are those of `Notices.look`.
  """
  leaves = np.flatnonzero(forest.leaf)
  found = np.unique(rewards[leaves])
  if len(found) > 1:
    return "alike", "rewards differ from prompt to prompt, but not between responses to one"
  return f"all {found[0]}", _all_equal(config, forest, leaves, float(found[0]), metrics)


def _all_equal(config, forest, leaves, reward, metrics) -> str:
  line = f"all {len(leaves)} responses have reward {reward:g}"
  if reward > 0:
    return line
  line = f"no reward yet, {line} from config.data.grader '{config.data.grader}'"
  if cut_off := int(np.sum(~forest.finished[leaves])):
    line += f"; {cut_off} were cut off at config.rollout.max_response_tokens "
    line += str(config.rollout.max_response_tokens)
    if not config.advantage.grade_unfinished:
      line += f", for config.advantage.unfinished_penalty {config.advantage.unfinished_penalty:g}"
  if failures := metrics["train/grader_failures"]:
    line += f"; the grader failed on {failures}"
  return f"{line}; rollouts/ has some to read"
