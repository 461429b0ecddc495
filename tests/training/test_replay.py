"""The replay buffer against the reference's counts, a naive list, and itself resumed."""

import collections
import itertools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.forest import Forest, concatenate
from spo_jax.infra.checkpoints import Checkpoints
from spo_jax.training.packing import PackConfig, PackedForest, pack
from spo_jax.training.replay import ReplayBuffer
from tests.training.forests import chain_forest, own_segments, path_tokens, tree_forest

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "replay_buffer.json"
REFERENCE = json.loads(FIXTURE.read_text())
RULE = {
  "max_age": REFERENCE["rule"]["max_age_in_iterations"],
  "segments_per_question": REFERENCE["rule"]["max_edges_per_question_per_call"],
}
IDENTICAL = "identical_edges_are_all_removed"


def count(values) -> dict[str, int]:
  """How often each value occurs, as JSON has it."""
  return dict(collections.Counter(str(int(value)) for value in values))


def counts_of_calls(calls, *, max_age, segments_per_question, equal_tokens=False):
  """What the reference's table tells of its calls, of ours.

  A question's segments are the leaves of two trees; advantages tell the iteration, old log-probs
  the question.
  """
  buffer = ReplayBuffer(max_age=max_age, segments_per_question=segments_per_question)
  rng = np.random.default_rng(0)
  told = []
  for call in calls:
    iteration, trees, questions = call["iteration"], [], []
    for question, segments in call["added"].items():
      for branch in (segments // 3, segments - segments // 3):
        tree = tree_forest(rng, (branch,), (2,), prompts=(1,))
        if equal_tokens:
          tree = tree._replace(tokens=np.full_like(tree.tokens, 7))
        trees.append(tree._replace(logprobs=np.full_like(tree.logprobs, int(question))))
        questions.append(int(question))
    if trees:
      forest = concatenate(trees)
      advantages = np.full(len(forest.parent), iteration + 1, np.float32)
      buffer.add(iteration, forest, np.array(questions), advantages, own_segments(forest))
    forest, advantages, trained = buffer.draw(iteration, rng)
    origins = advantages[trained].astype(int) - 1
    state = buffer.state()
    told.append(
      call
      | {
        "returned_total": trained.sum(),
        "returned_per_question": count(forest.logprobs[forest.offsets[1:][trained] - 1]),
        "returned_per_iteration_of_origin": count(origins) if len(set(origins)) < 2 else None,
        "removed_by_age": buffer.expired,
        "left_in_buffer": len(buffer),
        "left_per_question": count(state["questions"][state["waiting"]]),
      }
    )
  return told


@pytest.mark.parametrize("name", sorted(REFERENCE["scenarios"].keys() - {IDENTICAL}))
def test_counts_are_those_of_the_reference(name):
  calls = REFERENCE["scenarios"][name]
  assert counts_of_calls(calls, **RULE) == calls


def test_equal_segments_are_segments_of_their_own():
  """The reference drops the 8 of 40 equal segments that it did not draw; ours draws them next."""
  first, second = REFERENCE["scenarios"][IDENTICAL]
  assert (first["left_in_buffer"], second["returned_total"]) == (0, 0)
  assert counts_of_calls([first, second], **RULE, equal_tokens=True) == [
    first | {"left_in_buffer": 8, "left_per_question": {"0": 8}},
    second
    | {
      "returned_total": 8,
      "returned_per_question": {"0": 8},
      "returned_per_iteration_of_origin": {"0": 8},
    },
  ]


def random_iteration(rng, first_token: int):
  """A forest with tokens of its own, questions of which some come twice, advantages, trained."""
  forest = concatenate(
    [
      tree_forest(
        rng, (2, 3, 2), (3, 2, 4), prompts=rng.integers(1, 4, rng.integers(1, 4)), ragged=True
      ),
      chain_forest(rng, prompts=(2, 1), samples=2, segments=4),
    ]
  )
  tokens = np.arange(first_token, first_token + len(forest.tokens), dtype=np.int32)
  advantages = rng.standard_normal(len(forest.parent)).astype(np.float32)
  trained = own_segments(forest) & (rng.random(len(advantages)) < rng.choice([0, 0.2, 0.8]))
  questions = rng.integers(0, 5, forest.tree.max() + 1)
  return forest._replace(tokens=tokens), questions, advantages, trained


def segments_of(forest: Forest, advantages, trained) -> dict[tuple, tuple]:
  """What is trained: the tokens from the root on -> depth, length, log-probs, advantage."""
  segments = {}
  for node in np.flatnonzero(trained):
    path = path_tokens(forest, node)
    own = path[-forest.lengths[node] :]
    segments[tuple(forest.tokens[path])] = (
      forest.depth[node],
      len(own),
      *forest.logprobs[own],
      advantages[node],
    )
  assert len(segments) == trained.sum()
  return segments


@pytest.mark.parametrize("seed", range(12))
def test_draws_are_those_of_a_list_of_segments(seed):
  """Whatever is drawn was waiting, as many of each question as there may be, and never again."""
  rng = np.random.default_rng(seed)
  max_age, most = int(rng.integers(1, 5)), int(rng.choice([1, 3, 10]))
  buffer = ReplayBuffer(max_age=max_age, segments_per_question=most)
  waiting: list[tuple[int, int, tuple, tuple]] = []  # iteration, question, path, the rest
  first_token, drawn_in_all, expired_in_all = 1, 0, 0
  for iteration in range(3, 25):
    if rng.random() < 0.2:  # an iteration that samples and trains nothing
      continue
    for _ in range(rng.integers(0, 3)):
      forest, questions, advantages, trained = random_iteration(rng, first_token)
      first_token += len(forest.tokens)
      buffer.add(iteration, forest, questions, advantages, trained)
      tree_of = dict(
        zip(segments_of(forest, advantages, trained), forest.tree[trained], strict=True)
      )
      for path, rest in segments_of(forest, advantages, trained).items():
        waiting.append((iteration, int(questions[tree_of[path]]), path, rest))
    assert len(buffer) == len(waiting)
    assert_keeps_no_more_than_it_needs(buffer)
    forest, advantages, trained = buffer.draw(iteration, np.random.default_rng((seed, iteration)))
    drawn = segments_of(forest, advantages, trained)

    fresh = [segment for segment in waiting if iteration - segment[0] < max_age]
    assert buffer.expired == len(waiting) - len(fresh)
    there = collections.Counter(question for _, question, _, _ in fresh)
    taken = collections.Counter(question for _, question, path, _ in fresh if path in drawn)
    assert taken == {question: min(most, number) for question, number in there.items()}
    assert drawn.items() <= {path: rest for *_, path, rest in fresh}.items()
    assert list(drawn) == [path for *_, path, _ in fresh if path in drawn]
    waiting = [segment for segment in fresh if segment[2] not in drawn]
    assert len(buffer) == len(waiting)
    drawn_in_all += len(drawn)
    expired_in_all += buffer.expired
    assert_no_more_than_needed(forest, trained)
    assert_keeps_no_more_than_it_needs(buffer)
  assert drawn_in_all and (expired_in_all or most == 10)


def assert_keeps_no_more_than_it_needs(buffer: ReplayBuffer):
  state = buffer.state()
  forest = Forest(**{name: state[name] for name in Forest._fields})
  assert_no_more_than_needed(forest, state["waiting"])


def assert_no_more_than_needed(forest: Forest, needed):
  """Nodes that nothing continues are those that are needed; trees are numbered without gaps."""
  has_children = np.zeros(len(forest.parent), bool)
  has_children[forest.parent[forest.parent >= 0]] = True
  assert (needed | has_children).all()
  np.testing.assert_array_equal(forest.tree[forest.parent < 0], np.arange(sum(forest.parent < 0)))
  np.testing.assert_array_equal(
    forest.tree[forest.parent >= 0], forest.tree[forest.parent[forest.parent >= 0]]
  )


def test_all_sets_of_a_question_are_drawn_alike():
  """Two of five segments, of two iterations and three trees: each of ten pairs one time in ten."""
  rng = np.random.default_rng(0)
  old = tree_forest(rng, (1, 2), (1, 1), prompts=(1,))
  new = tree_forest(rng, (1,), (1,), prompts=(1, 1))
  pairs, repeats = collections.Counter(), 3000
  buffer = ReplayBuffer(max_age=2, segments_per_question=2)
  for iteration, forest, tokens in ((0, old, [90, 1, 2, 3]), (1, new, [91, 92, 4, 5])):
    forest = forest._replace(tokens=np.array(tokens, np.int32))
    advantages = np.ones(len(tokens), np.float32)
    buffer.add(iteration, forest, np.array([6, 6]), advantages, own_segments(forest))
  state = buffer.state()
  for repeat in range(repeats):
    buffer.restore(state)
    forest, _, trained = buffer.draw(1, np.random.default_rng((repeat, 1)))
    pairs[tuple(forest.tokens[forest.offsets[:-1][trained]])] += 1
  assert set(pairs) == set(itertools.combinations(range(1, 6), 2))
  spread = np.sqrt(repeats * 0.1 * 0.9)
  assert max(abs(number - repeats / 10) for number in pairs.values()) < 4 * spread


def test_a_union_packs_like_the_forests_that_it_came_from():
  """Ancestors are context, trained before or not: the batch is that of the whole forests with all
  but the drawn segments untrained.
  """
  rng = np.random.default_rng(4)
  buffer = ReplayBuffer(max_age=3, segments_per_question=3)
  parts, first_token, trained_before = [], 1, set()
  for iteration in range(3):
    forest, _, advantages, _ = random_iteration(rng, first_token)
    first_token += len(forest.tokens)
    parts.append((forest, advantages))
    questions = np.arange(forest.tree.max() + 1)
    buffer.add(iteration, forest, questions, advantages, own_segments(forest))
    union, drawn_advantages, trained = buffer.draw(iteration, rng)
    names = union.tokens[union.offsets[:-1]]  # a node's first token tells it from all others
    drawn_names, context_names = set(names[trained]), set(names[~trained])
    assert not drawn_names & trained_before
    assert bool(context_names & trained_before) == (iteration > 0)
    trained_before |= drawn_names
  whole = concatenate([forest for forest, _ in parts])
  drawn = np.isin(whole.tokens[whole.offsets[:-1]], names[trained])
  ends = np.cumsum([len(forest.parent) for forest, _ in parts])
  assert set(np.searchsorted(ends, np.flatnonzero(drawn), side="right")) == {0, 1, 2}

  cfg = PackConfig(48, 2, 16, 8)
  batch, counts = pack(union, drawn_advantages, trained, cfg)
  advantages = np.concatenate([advantages for _, advantages in parts])
  want, want_counts = pack(whole, advantages, drawn, cfg)
  assert counts == want_counts
  for name, a, b in zip(PackedForest._fields, batch, want, strict=True):
    np.testing.assert_array_equal(a, b, err_msg=name)
  assert_trains(whole, drawn, batch)


def assert_trains(forest: Forest, drawn, batch: PackedForest):
  """The loss tokens of a batch are those of the drawn nodes of a forest with tokens 1, 2, 3, ...,
  each with the tokens before it as context.
  """
  context = {}
  for node in np.flatnonzero(drawn):
    path = (np.array(path_tokens(forest, node)) + 1).tolist()
    for end in range(len(path) - forest.lengths[node], len(path)):
      context[path[end]] = path[: end + 1]
  rows = [
    x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.prev, batch.positions, batch.loss_mask)
  ]
  found = {}
  for tokens, prev, positions, loss_mask in zip(*rows, strict=True):
    for place in np.flatnonzero(loss_mask):
      walked, at = [], place
      while at >= 0:
        walked.append(int(tokens[at]))
        at = prev[at]
      assert positions[place] == len(walked) - 1
      found[walked[0]] = walked[::-1]
  assert found == context
  assert batch.loss_mask.sum() == len(context)


def same(a, b) -> bool:
  return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def run(buffer, iterations, after=lambda iteration, buffer: buffer):
  """Adds and draws, an iteration a time; `after` may put another buffer in its place."""
  draws = []
  for iteration in iterations:
    forest, *rest = random_iteration(np.random.default_rng((1, iteration)), 1)
    buffer.add(iteration, forest, *rest)
    forest, advantages, trained = buffer.draw(iteration, np.random.default_rng((2, iteration)))
    draws.append((*forest, advantages, trained, np.array([buffer.expired, len(buffer)])))
    buffer = after(iteration, buffer)
  return draws


def new_buffer() -> ReplayBuffer:
  return ReplayBuffer(max_age=3, segments_per_question=2)


def test_a_resumed_buffer_draws_as_if_it_had_not_been_interrupted(tmp_path):
  """Through checkpoints on disk after every iteration, that of an empty buffer included."""

  def resume(iteration, buffer):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(iteration + 1, {"w": jnp.zeros(1)}, {}, buffer.state())
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=1)
    resumed = new_buffer()
    resumed.restore(checkpoints.restore_host_arrays(checkpoints.latest()))
    checkpoints.close()
    return resumed

  want = run(new_buffer(), range(10))
  assert len({len(draw[0]) for draw in want}) > 5 and sum(draw[-1][0] for draw in want) > 0
  got = run(resume(-1, new_buffer()), range(10), after=resume)
  assert all(same(a, b) for a, b in zip(got, want, strict=True))


def test_a_state_does_not_change_with_its_buffer():
  buffer = new_buffer()
  run(buffer, range(4))
  state = buffer.state()
  before = {name: array.copy() for name, array in state.items()}
  run(buffer, range(4, 8))
  assert same(state.values(), before.values())
  first, second = new_buffer(), new_buffer()
  for resumed in (first, second):
    resumed.restore(state)
  assert all(
    same(a, b) for a, b in zip(run(first, range(4, 8)), run(second, range(4, 8)), strict=True)
  )


def test_an_empty_buffer_gives_an_empty_union():
  buffer = new_buffer()
  forest, advantages, trained = buffer.draw(0, np.random.default_rng(0))
  assert (len(forest.parent), len(advantages), len(trained), len(buffer)) == (0, 0, 0, 0)
  assert forest.offsets.tolist() == [0] and buffer.expired == 0


@pytest.mark.parametrize("bad", [{"max_age": 0}, {"segments_per_question": 0}])
def test_a_rule_that_draws_nothing_is_an_error(bad):
  with pytest.raises(ValueError, match="must be positive"):
    ReplayBuffer(**({"max_age": 1, "segments_per_question": 1} | bad))
