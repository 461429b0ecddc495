import jax
import numpy as np
import pytest

from spo_jax.algorithms import advantages, masking, partition
from tests.algorithms import reference
from tests.algorithms.test_values import tree_fixture

TOLERANCE = 1e-6


def _close(x64):
  return dict(rtol=1e-9, atol=1e-12) if x64 else dict(rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("x64", [False, True])
def test_trees_of_the_reference(fixture_arrays, x64):
  forest, want = tree_fixture(fixture_arrays)
  _, by_kind = reference.solve(forest, max_depth=3, x64=x64)
  edge = forest.parent >= 0
  assert not want["rounding_only"].any()
  for kind, name in [("difference", "rloo"), ("normalized", "grpo")]:
    np.testing.assert_allclose(by_kind[kind][edge], want[f"adv_{name}"][edge], **_close(x64))
    kept = advantages.nonzero(by_kind[kind], tolerance=TOLERANCE)
    np.testing.assert_array_equal(kept[edge], want[f"keep_{name}"][edge])
    np.testing.assert_array_equal(by_kind[kind][~edge], 0)
  np.testing.assert_allclose(_prover(by_kind)[edge], want["prover_adv"][edge], **_close(x64))
  # B increases, so that both parts have one sign.
  kept = advantages.nonzero(by_kind["prover"], tolerance=TOLERANCE)
  np.testing.assert_array_equal(kept[edge], want["keep_rloo"][edge])


def _prover(by_kind):
  """The prover's part of the advantage "prover"."""
  return (by_kind["prover"] - by_kind["difference"]) / reference.PROVER_WEIGHT


@pytest.mark.parametrize("x64", [False, True])
def test_equal_siblings_are_dropped(fixture_arrays, x64):
  """The reference keeps the edges that float64 rounding leaves; a tolerance drops them."""
  data = fixture_arrays("tree_equal_siblings")
  cases = range(len(data["case_name"]))
  trees = [
    reference.group_forest(np.zeros(len(rewards), int), rewards)
    for rewards in (data[f"c{n}__leaf_reward"][1:] for n in cases)
  ]
  forest, _ = reference.concatenate(trees)
  whole = lambda name: np.concatenate([data[f"c{n}__{name}"] for n in cases])
  nodes, by_kind = reference.solve(forest, max_depth=1, x64=x64)
  np.testing.assert_allclose(nodes.values, whole("value"), rtol=1e-12 if x64 else 1e-6)
  edge = forest.parent >= 0
  for kind, name in [("difference", "rloo"), ("normalized", "grpo")]:
    rounding = np.nan_to_num(whole(f"adv_{name}"))
    np.testing.assert_allclose(by_kind[kind], rounding, atol=TOLERANCE)
    keep = advantages.nonzero(by_kind[kind], tolerance=TOLERANCE)
    reference_keep = whole(f"keep_{name}")
    np.testing.assert_array_equal(keep[edge], (reference_keep & ~whole("rounding_only"))[edge])
    assert reference_keep[edge].any()
  rounding = np.nan_to_num(whole("prover_adv"))
  np.testing.assert_allclose(_prover(by_kind), rounding, atol=TOLERANCE)


@pytest.mark.parametrize("x64", [False, True])
def test_groups_of_the_reference(fixture_arrays, x64):
  """A one-level forest is GRPO and RLOO."""
  data = fixture_arrays("group_advantages")
  cases = range(len(data["case_name"]))
  groups = [reference.group_forest(data[f"c{n}__group_id"], data[f"c{n}__score"]) for n in cases]
  forest, offsets = reference.concatenate(groups)
  _, by_kind = reference.solve(forest, max_depth=1, x64=x64)
  response = forest.parent >= 0
  score = np.concatenate([data[f"c{n}__score"] for n in cases])
  np.testing.assert_array_equal(forest.rewards[response], score)
  # The spread of `tiny_spread` is below float32's resolution of its scores.
  tiny = list(data["case_name"]).index("tiny_spread")
  exact = np.arange(len(response)) < (len(response) if x64 else offsets[tiny])
  for kind, name in [("leave_one_out", "rloo"), ("normalized", "grpo")]:
    want = np.zeros(len(response))
    want[response] = np.concatenate([data[f"c{n}__adv_{name}"] for n in cases])
    rounding = dict(rtol=1e-9, atol=2e-8) if x64 else _close(x64)
    np.testing.assert_allclose(by_kind[kind][exact], want[exact], **rounding)


def _chain(cutpoints, cutpoint_values, score, length):
  """A trajectory as a path forest and its starts; a cut without a value is no boundary."""
  valued = {int(c): v for c, v in zip(cutpoints, cutpoint_values, strict=True) if np.isfinite(v)}
  score = valued.pop(length - 1, score)
  starts = np.zeros((1, length), bool)
  starts[0, [c + 1 for c in valued]] = True
  probes = [[valued[c]] for c in sorted(valued)]
  if -1 not in valued:
    probes.insert(0, [])
  segments = np.asarray(partition.segment_index(starts))[0]
  node_of_token = segments if starts[0, 0] else segments + 1
  return reference.path_forest(probes, score), node_of_token, starts[0]


def _solve_chains(rows, length, x64):
  """[(cutpoints, values, score, length)] -> token values and advantages, and starts, [B, T]."""
  chains = [_chain(*row) for row in rows]
  forest, offsets = reference.concatenate([chain for chain, _, _ in chains])
  node_of_token = np.full((len(rows), length), -1, np.int32)
  starts = np.zeros((len(rows), length), bool)
  for row, (_, nodes, row_starts) in enumerate(chains):
    node_of_token[row, : len(nodes)] = nodes + offsets[row]
    starts[row, : len(nodes)] = row_starts
  nodes, by_kind = reference.solve(forest, max_depth=int(forest.depth.max()), x64=x64)
  of_tokens = lambda x: np.where(node_of_token >= 0, np.asarray(x)[node_of_token], 0)
  return of_tokens(nodes.values), of_tokens(by_kind["difference"]), starts


@pytest.mark.parametrize("x64", [False, True])
def test_chains_of_the_reference(fixture_arrays, x64):
  data = fixture_arrays("chain_token_advantages")
  length = data["resp_prob"].shape[1]
  rows = [
    (data["cutpoints"][i, :n], data["cutpoint_values"][i, :n], data["score"][i], size)
    for i, (n, size) in enumerate(zip(data["num_cutpoints"], data["resp_len"], strict=True))
  ]
  got_values, got, starts = _solve_chains(rows, length, x64)
  response = np.arange(length) < data["resp_len"][:, None]
  with jax.enable_x64(x64):
    logprobs = np.log(np.where(response, data["resp_prob"], 1)).astype(got.dtype)
    unlikely = np.asarray(masking.probability_mask(logprobs, response, threshold=0.9))
  # The reference zeroes tokens above the threshold; one at it is left to the mask of its loss.
  got = got * (unlikely | (data["resp_prob"] == 0.9))
  np.testing.assert_allclose(got[response], data["advantages"][response], **_close(x64))
  np.testing.assert_array_equal(got[~response], 0)

  valued = np.isfinite(data["token_values"])
  np.testing.assert_allclose(got_values[valued], data["token_values"][valued], **_close(x64))
  last = np.arange(length) == data["resp_len"][:, None] - 1
  ends = last | np.pad(starts[:, 1:], ((0, 0), (0, 1)))
  cut = starts.any(axis=1)
  np.testing.assert_array_equal(valued[cut], ends[cut])


@pytest.mark.parametrize("x64", [False, True])
def test_naive_thirds_of_the_reference(fixture_arrays, x64):
  """Equal cuts, valued like any others; likely tokens keep their advantage."""
  data = fixture_arrays("chain_naive")
  length = data["advantages"].shape[1]
  columns = [data[k] for k in ("cutpoints", "cutpoint_values", "score", "resp_len")]
  got_values, got, _ = _solve_chains(list(zip(*columns, strict=True)), length, x64)
  response = np.arange(length) < data["resp_len"][:, None]
  np.testing.assert_allclose(got[response], data["advantages"][response], **_close(x64))
  valued = np.isfinite(data["token_values"])
  np.testing.assert_allclose(got_values[valued], data["token_values"][valued], **_close(x64))


def test_normalized_advantages_of_siblings_have_mean_zero_and_unit_spread():
  rng = np.random.default_rng(0)
  forest = reference.group_forest(np.repeat(np.arange(5), 6), rng.normal(size=30))
  _, by_kind = reference.solve(forest, max_depth=1)
  siblings = by_kind["normalized"][5:].reshape(5, 6)
  np.testing.assert_allclose(siblings.mean(axis=1), 0, atol=1e-6)
  np.testing.assert_allclose(siblings.std(axis=1), 1, rtol=1e-5)


def test_prover_of_one_sample_is_the_policy():
  forest = reference.group_forest([0, 0, 0], [0.1, 0.4, 1.0])
  nodes, by_kind = reference.solve(forest, max_depth=1)
  one = advantages.prover(nodes, forest.parent, best_of=1)
  np.testing.assert_allclose(one, by_kind["difference"], atol=1e-6)
  # Of two: B(v) = 1 - (1 - v)², B(0.5) = 0.75.
  two = advantages.prover(nodes, forest.parent, best_of=2)
  np.testing.assert_allclose(two[1:], [0.19 - 0.75, 0.64 - 0.75, 0.25], atol=1e-6)
  pav = advantages.progress(nodes, forest.parent, best_of=2, prover_weight=3.0)
  np.testing.assert_allclose(pav, by_kind["difference"] + 3 * two, atol=1e-6)
  with pytest.raises(ValueError, match="best_of must be positive, got 0"):
    advantages.prover(nodes, forest.parent, best_of=0)


def test_reward_has_no_baseline():
  """Every node but prompts, and but those that nothing estimates, has its own value."""
  path = reference.path_forest([[1.0, 0.0], [], [1.0, 1.0]], score=0.5)
  group = reference.group_forest([0, 0], [2.0, -1.0])
  forest, _ = reference.concatenate([path, group])
  nodes, by_kind = reference.solve(forest, max_depth=3)
  assert nodes.filled[1]
  want = [0, 0, 1, 0.5, 1, 0, 1, 1, 0, 2, -1]
  np.testing.assert_allclose(by_kind["reward"], want)


def test_leave_one_out_of_an_uncounted_node_is_its_difference():
  forest = reference.path_forest([[1.0, 0.0, 0.0], [1.0, 1.0]], score=0.5)
  _, by_kind = reference.solve(forest, max_depth=2)
  np.testing.assert_allclose(by_kind["leave_one_out"][:3], [0, 2 / 3, -0.5], rtol=1e-6)
  np.testing.assert_allclose(by_kind["leave_one_out"][3:6], [1, -0.5, -0.5], rtol=1e-6)


@pytest.mark.parametrize("parts", [[0.1, 0.7, -0.3, 0.9, 0.2], [0.1, 0.7, -0.8, 0.3, -0.3]])
def test_rounding_does_not_become_a_signal(parts):
  """Inner nodes that are equal but for the order of their sums get 0, not rounding / rounding."""
  nodes = [(-1, 0, np.nan, False, True)]
  for shift in range(5):
    inner = len(nodes)
    nodes.append((0, 1, np.nan, False, True))
    nodes += [(inner, 2, reward, True, True) for reward in np.roll(parts, shift)]
  forest = reference.make_forest(nodes)
  solved, by_kind = reference.solve(forest, max_depth=2)
  inner = forest.depth == 1
  assert np.any(solved.values[inner] != solved.values[inner][0])
  np.testing.assert_array_equal(by_kind["normalized"][inner], 0)


def test_unknown_advantage_raises():
  with pytest.raises(
    ValueError, match="difference.*leave_one_out.*normalized.*prover.*reward.*shrinkage"
  ):
    advantages.make_advantage("gae", eps=1e-8, best_of=4, prover_weight=5.0, max_depth=1)
