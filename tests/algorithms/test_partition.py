import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.algorithms import partition

HYPER = dict(threshold=0.9, interval=5, length=3, delimiter_ids=(7, 9), parts=4)
_cutpoints = jax.jit(partition.cutpoints, static_argnames=("threshold", "interval"))


def _random_rows(seed, rows=6, length=17):
  """Log-probabilities, tokens and contiguous masks that start and end anywhere."""
  rng = np.random.default_rng(seed)
  logprobs = np.log(rng.uniform(0.6, 1.0, (rows, length))).astype(np.float32)
  tokens = rng.integers(5, 11, (rows, length)).astype(np.int32)
  first = rng.integers(0, 6, (rows, 1))
  last = first + rng.integers(0, 12, (rows, 1))
  place = np.arange(length)
  return logprobs, tokens, (place >= first) & (place < last)


def _naive_starts(kind, tokens, logprobs, mask):
  starts = np.zeros_like(mask)
  for row in range(mask.shape[0]):
    response = [t for t in range(mask.shape[1]) if mask[row, t]]
    low = [t for t in response if np.exp(logprobs[row, t]) < HYPER["threshold"]]
    for i, t in enumerate(response):
      if kind == "adaptive":
        starts[row, t] = t in low[:: HYPER["interval"]]
      elif kind == "fixed":
        starts[row, t] = i % HYPER["length"] == 0
      elif kind == "equal":
        parts = np.array_split(response, HYPER["parts"])
        starts[row, t] = t in [part[0] for part in parts if len(part)]
      elif kind == "delimiter":
        starts[row, t] = i == 0 or tokens[row, response[i - 1]] in HYPER["delimiter_ids"]
      else:
        starts[row, t] = kind == "token" or i == 0
  return starts


def test_cutpoints_of_the_reference(fixture_arrays):
  data = fixture_arrays("chain_cutpoints")
  rows, length = data["resp_logp"].shape
  mask = np.arange(length) < data["resp_len"][:, None]
  for j, interval in enumerate(data["intervals"]):
    starts = np.asarray(_cutpoints(data["resp_logp"], mask, threshold=0.9, interval=int(interval)))
    for row in range(rows):
      cuts = data["cutpoints"][row, j, : data["num_cutpoints"][row, j]]
      np.testing.assert_array_equal(np.flatnonzero(starts[row]) - 1, cuts)
    segments = np.where(mask, partition.segment_index(starts), -1)
    np.testing.assert_array_equal(segments, data["segment_id"][:, j])


def test_cutpoints_see_the_response_alone(fixture_arrays):
  """The whole sequence with a mask on the response gives the response's own starts."""
  data = fixture_arrays("chain_cutpoints")
  first = data["query_len"][:, None] - 1
  place = np.arange(data["seq_logp"].shape[1])
  mask = (place >= first) & (place < first + data["resp_len"][:, None])
  starts = np.asarray(_cutpoints(data["seq_logp"], mask, threshold=0.9, interval=2))
  interval = list(data["intervals"]).index(2)
  for row, begin in enumerate(first[:, 0]):
    cuts = data["cutpoints"][row, interval, : data["num_cutpoints"][row, interval]]
    np.testing.assert_array_equal(np.flatnonzero(starts[row]) - begin - 1, cuts)


def test_equal_parts_of_the_reference(fixture_arrays):
  """Apart from the first start. Parts without a token, which the reference cuts too, are none."""
  data = fixture_arrays("chain_naive")
  mask = np.arange(100) < data["resp_len"][:, None]
  starts = np.asarray(jax.jit(partition.equal_parts, static_argnames="parts")(mask, parts=4))
  assert min(data["resp_len"]) < 4
  for row, length, cuts in zip(starts, data["resp_len"], data["cutpoints"], strict=True):
    first, *others = np.flatnonzero(row)
    assert first == 0
    np.testing.assert_array_equal(np.array(others) - 1, cuts[cuts < length - 1])


def test_threshold_is_strict_and_exact_in_float32(fixture_arrays):
  data = fixture_arrays("chain_threshold_boundary")
  logprobs = data["resp_logp"][None]
  starts = _cutpoints(logprobs, np.ones_like(logprobs, bool), threshold=0.9, interval=1)
  assert starts.dtype == bool and jnp.asarray(logprobs).dtype == jnp.float32
  np.testing.assert_array_equal(starts[0], data["below_threshold"])


@pytest.mark.parametrize("kind", sorted(partition.PARTITIONS))
def test_partitions_against_plain_python(kind):
  logprobs, tokens, mask = _random_rows(seed=1)
  starts = jax.jit(partition.make_partition(kind, **HYPER))(tokens, logprobs, mask)
  assert starts.dtype == bool and np.any(starts)
  np.testing.assert_array_equal(starts, _naive_starts(kind, tokens, logprobs, mask))
  one_row = partition.make_partition(kind, **HYPER)(tokens[:1], logprobs[:1], mask[:1])
  np.testing.assert_array_equal(one_row, starts[:1])


def test_partitions_that_are_special_cases_of_others():
  logprobs, tokens, mask = _random_rows(seed=2)
  every_token = partition.token_level(mask)
  np.testing.assert_array_equal(every_token, mask)
  np.testing.assert_array_equal(partition.fixed_length(mask, length=1), every_token)
  np.testing.assert_array_equal(
    partition.cutpoints(logprobs, mask, threshold=1.1, interval=1), every_token
  )
  np.testing.assert_array_equal(
    partition.fixed_length(mask, length=100), partition.whole_response(mask)
  )
  np.testing.assert_array_equal(
    partition.equal_parts(mask, parts=1), partition.whole_response(mask)
  )
  np.testing.assert_array_equal(partition.equal_parts(mask, parts=50), every_token)
  np.testing.assert_array_equal(
    partition.delimiters(tokens, mask, delimiter_ids=()), partition.whole_response(mask)
  )


def test_bad_arguments_raise():
  logprobs, _, mask = _random_rows(seed=3)
  with pytest.raises(ValueError, match="adaptive.*delimiter.*equal.*fixed.*response.*token"):
    partition.make_partition("thirds", **HYPER)
  with pytest.raises(ValueError, match="interval"):
    partition.cutpoints(logprobs, mask, threshold=0.9, interval=0)
  with pytest.raises(ValueError, match="threshold"):
    partition.cutpoints(logprobs, mask, threshold=0.0, interval=1)
  with pytest.raises(ValueError, match="length"):
    partition.fixed_length(mask, length=0)
  with pytest.raises(ValueError, match="parts"):
    partition.equal_parts(mask, parts=0)
  with pytest.raises(AssertionError):
    partition.cutpoints(logprobs[:, 1:], mask, threshold=0.9, interval=1)
