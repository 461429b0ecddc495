import functools

import jax
import numpy as np
import pytest

from spo_jax.algorithms import masking
from tests.algorithms import reference

SHAPE = (8, 33)


@functools.partial(jax.jit, static_argnames="unbiased")
def _statistics(x, mask, logprobs, *, unbiased):
  likely = masking.probability_mask(logprobs, mask, threshold=0.9)
  whiten = functools.partial(masking.whiten, x, mask, unbiased=unbiased)
  return {
    "masked_mean": masking.masked_mean(x, mask),
    "masked_mean_axis1": masking.masked_mean(x, mask, axis=1),
    "masked_var": masking.masked_var(x, mask, unbiased=unbiased),
    "whiten": whiten(shift_mean=True),
    "whiten_noshift": whiten(shift_mean=False),
    "whiten_probmask": whiten(statistics_mask=likely, shift_mean=True),
    "rescale": masking.rescale(x, mask, unbiased=unbiased),
  }


def _undefined(mask, likely, unbiased):
  """Where the reference gives NaN: too few tokens for a mean or a variance."""
  too_few = mask.sum() <= unbiased
  return {
    "masked_mean": not mask.any(),
    "masked_mean_axis1": ~mask.any(axis=1),
    "whiten_probmask": likely.sum() <= unbiased if likely.any() else too_few,
  } | dict.fromkeys(["masked_var", "whiten", "whiten_noshift", "rescale"], too_few)


@pytest.mark.parametrize("unbiased", [False, True])
def test_statistics_of_the_reference(fixture_arrays, unbiased):
  data = fixture_arrays("masked_stats")
  raises = reference.load_json("masked_stats")["raises_ValueError"]
  suffix = "_unbiased" if unbiased else "_biased"
  for n, name in enumerate(data["case_name"]):
    x, logprobs, mask = (data[f"c{n}__{k}"] for k in ("values", "logprobs", "mask"))
    mask = mask > 0
    undefined = _undefined(mask, mask & (np.exp(logprobs) < 0.9), unbiased)
    got = _statistics(
      *[reference.padded(array, *SHAPE) for array in (x, mask, logprobs)], unbiased=unbiased
    )
    for key, array in got.items():
      key_in_file = key if key.startswith("masked_mean") else key + suffix
      assert np.all(np.isfinite(array)), (name, key)
      if key_in_file in raises.get(str(name), ()):
        assert f"c{n}__{key_in_file}" not in data
        continue
      want = data[f"c{n}__{key_in_file}"]
      nan = np.broadcast_to(undefined[key], want.shape)
      np.testing.assert_array_equal(np.isnan(want), nan, err_msg=f"{name} {key}")
      array = np.asarray(array)[tuple(slice(0, size) for size in want.shape)]
      np.testing.assert_allclose(
        array[~nan], want[~nan], rtol=2e-4, atol=1e-5, err_msg=f"{name} {key}"
      )


@pytest.mark.parametrize("unbiased", [False, True])
def test_an_empty_mask_changes_nothing(unbiased):
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  got = _statistics(x, np.zeros((2, 3), bool), np.full((2, 3), -1e9, np.float32), unbiased=unbiased)
  for key in ("whiten", "whiten_noshift", "whiten_probmask", "rescale"):
    np.testing.assert_array_equal(got[key], x)
  for key in ("masked_mean", "masked_mean_axis1", "masked_var"):
    np.testing.assert_array_equal(got[key], 0)


def test_a_single_token_has_no_unbiased_variance():
  x = np.array([[5.0, 7.0]], np.float32)
  mask = np.array([[True, False]])
  got = _statistics(x, mask, np.full_like(x, -1.0), unbiased=True)
  np.testing.assert_array_equal(got["whiten"], [[0, 2]])
  np.testing.assert_array_equal(got["whiten_noshift"], x)
  np.testing.assert_array_equal(got["rescale"], x)
  assert got["masked_var"] == 0


def test_probability_mask_is_strict_and_inside_the_mask():
  logprobs = np.log(np.array([[0.5, 0.89, 0.91, 1.0, 0.5]], np.float32))
  mask = np.array([[True, True, True, True, False]])
  got = masking.probability_mask(logprobs, mask, threshold=0.9)
  np.testing.assert_array_equal(got, [[True, True, False, False, False]])
  at_threshold = np.full((1, 1), np.log(0.9), np.float32)
  assert not masking.probability_mask(at_threshold, mask[:, :1], threshold=0.9).any()
  with pytest.raises(ValueError, match="threshold"):
    masking.probability_mask(logprobs, mask, threshold=0)


def test_sums_and_counts_of_parts_add_up():
  rng = np.random.default_rng(0)
  x, mask = rng.normal(size=(4, 7)).astype(np.float32), rng.random((4, 7)) < 0.5
  x = np.where(mask, x, np.nan)
  parts = [masking.masked_sum_count(x[i : i + 2], mask[i : i + 2]) for i in (0, 2)]
  total, count = np.sum(parts, axis=0)
  np.testing.assert_allclose(total, x[mask].sum(), rtol=1e-6)
  np.testing.assert_allclose(masking.masked_mean(x, mask), x[mask].mean(), rtol=1e-6)
  assert count == mask.sum()
