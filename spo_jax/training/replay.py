"""Replay: trained segments wait for their turn over a few iterations.

An iteration may train no more than so many segments a question; what is left over waits, with the
log-probs under the policy that sampled it, and is dropped when it is too old. AIFrameResearch/SPO
trains its trees so, with at most 32 segments a question and iteration, up to 8 iterations old.
"""

import numpy as np

from spo_jax.forest import Forest, ForestBuilder, concatenate, prune


class ReplayBuffer:
  """Segments that wait, in one forest with the ancestors that they continue."""

  def __init__(self, *, max_age: int, segments_per_question: int):
    """Begins empty.

    Args:
      max_age: iterations in which a segment may be drawn, that of its sampling included.
      segments_per_question: most segments of a question in a draw.
    """
    if min(max_age, segments_per_question) < 1:
      raise ValueError(
        f"max_age {max_age} and segments_per_question {segments_per_question} must be positive"
      )
    self._max_age, self._segments_per_question = max_age, segments_per_question
    self.expired = 0  # segments that the last draw dropped for their age
    nothing = ForestBuilder()
    nothing.add_roots(np.zeros((0, 0), np.int32), np.zeros(0, np.int64))
    self._forest = nothing.build()
    self._nodes = {  # columns of length N, one entry a node of the forest
      "iterations": np.zeros(0, np.int64),  # in which the node was sampled
      "questions": np.zeros(0, np.int64),
      "advantages": np.zeros(0, np.float32),
      "waiting": np.zeros(0, bool),  # False at nodes that are here as context only
    }

  def __len__(self) -> int:
    """Segments that wait."""
    return int(self._nodes["waiting"].sum())

  def add(
    self,
    iteration: int,
    forest: Forest,
    questions: np.ndarray,
    advantages: np.ndarray,
    trained: np.ndarray,
  ) -> None:
    """Adds the trained segments of a forest.

    Args:
      iteration: in which it was sampled.
      forest: N nodes.
      questions: [trees] int64, what tells each tree's prompt from others in every iteration.
      advantages: [N] float32.
      trained: [N] bool; all other nodes are left out, but for the ancestors of these.
    """
    added, index = prune(forest, trained)
    columns = {
      "iterations": np.full(len(index), iteration),
      "questions": questions[forest.tree[index]],
      "advantages": advantages[index],
      "waiting": trained[index],
    }
    self._forest = concatenate([self._forest, added])
    self._nodes = {
      name: np.concatenate([old, columns[name].astype(old.dtype)])
      for name, old in self._nodes.items()
    }

  def draw(self, iteration: int, rng: np.random.Generator) -> tuple[Forest, np.ndarray, np.ndarray]:
    """Drops the segments that are too old, and takes out what is to be trained.

    Of each question so many segments as are allowed, or all there are, uniformly without
    replacement, whatever their iteration and tree.

    Args:
      iteration: the current one, from which ages count.
      rng: the draw is a function of its state and of the buffer's.

    Returns:
      (forest, advantages [N] float32, trained [N] bool), for `packing.pack`: the drawn segments,
      in the order in which they were added, and their ancestors, which are not trained again.
    """
    waiting, questions = self._nodes["waiting"], self._nodes["questions"]
    fresh = waiting & (iteration - self._nodes["iterations"] < self._max_age)
    self.expired = int(waiting.sum() - fresh.sum())
    shuffled = rng.permutation(np.flatnonzero(fresh))
    shuffled = shuffled[np.argsort(questions[shuffled], kind="stable")]  # question by question
    grouped = questions[shuffled]
    place = np.arange(len(grouped)) - np.searchsorted(grouped, grouped)  # among the question's
    drawn = np.zeros(len(fresh), bool)
    drawn[shuffled[place < self._segments_per_question]] = True
    forest, index = prune(self._forest, drawn)
    advantages = self._nodes["advantages"][index]
    self._keep(fresh & ~drawn)
    return forest, advantages, drawn[index]

  def _keep(self, waiting: np.ndarray) -> None:
    self._forest, index = prune(self._forest, waiting)
    self._nodes = {name: column[index] for name, column in self._nodes.items()}
    self._nodes["waiting"] = waiting[index]

  def state(self) -> dict[str, np.ndarray]:
    """All that waits, as arrays that nothing writes to."""
    return self._forest._asdict() | self._nodes

  def restore(self, state: dict[str, np.ndarray]) -> None:
    """Takes up where the buffer that gave this `state` was."""
    self._forest = Forest(**{name: state[name] for name in Forest._fields})
    self._nodes = {name: state[name] for name in self._nodes}
    self.expired = 0
