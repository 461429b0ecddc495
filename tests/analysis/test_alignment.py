"""Figures of agreement on gradients that are made up, with known answers."""

import numpy as np
import pytest

from spo_jax.analysis.alignment import adam_scale, align, mean_cosine, squared_norm, trust
from spo_jax.analysis.gradients import Gradients

PARAMETERS, BATCHES, PARTS = 2000, 64, 16


@pytest.fixture(scope="module")
def made_up():
  """A true gradient of length 1, noisy estimates of it, and batches of twice it and noise."""
  rng = np.random.default_rng(0)
  true = rng.normal(size=PARAMETERS)
  true /= np.linalg.norm(true)
  noise = lambda count, size: size * rng.normal(size=(count, PARAMETERS)) / np.sqrt(PARAMETERS)
  truth = (true + noise(PARTS, 2.0)).astype(np.float32)
  rows = (2 * true + noise(BATCHES, 6.0)).astype(np.float32)
  units = rng.integers(1, 5, BATCHES).astype(float)
  found = Gradients(rows * units[:, None].astype(np.float32), units, np.full(BATCHES, 10), 3)
  return true, truth, found


def test_noise_of_the_truth_is_taken_out(made_up):
  true, truth, found = made_up
  assert abs(squared_norm(truth) - 1) < 0.1
  assert np.sum(truth.mean(0) ** 2) > 1.2
  halves, own = trust(truth)
  mean = truth.mean(0)
  assert abs(own - mean @ true / np.linalg.norm(mean)) < 0.05
  assert abs(halves - 1 / (1 + 2.0**2 / (PARTS / 2))) < 0.1


def test_figures_are_those_of_signal_and_noise(made_up):
  _, truth, found = made_up
  one, four = (align(found, truth, multiple) for multiple in (1, 4))
  assert (one.updates, four.updates) == (64, 16)
  assert (one.tokens, four.tokens) == (10, 40) and (one.prompts, four.prompts) == (3, 12)
  assert abs(one.signal_to_noise.value - 4 / 36) < 3 * one.signal_to_noise.error < 0.05
  assert abs(four.signal_to_noise.value / one.signal_to_noise.value - 4) < 1e-6
  assert abs(one.cosine.value - np.sqrt(4 / 40)) < 0.03
  # Units of a batch are its weight in the mean, so four are worth a little less than four.
  assert abs(four.cosine.value - np.sqrt(4 / (4 + 36 / 4))) < 0.06
  assert abs(one.mean_cosine.value - 1) < 3 * one.mean_cosine.error < 0.2
  assert abs(one.adam_cosine.value - one.cosine.value) < 0.06  # noise is alike everywhere
  assert four.mean_cosine == one.mean_cosine


def test_a_gradient_across_the_true_one_has_cosine_zero(made_up):
  true, truth, _ = made_up
  rng = np.random.default_rng(1)
  across = rng.normal(size=PARAMETERS)
  across -= (across @ true) * true
  rows = (across + 0.1 * rng.normal(size=(8, PARAMETERS))).astype(np.float32)
  assert abs(mean_cosine(rows, truth).value) < 0.1


def test_a_batch_that_teaches_nothing_goes_nowhere(made_up):
  _, truth, found = made_up
  silent = np.zeros_like(found.sums)
  half = found._replace(sums=np.where(np.arange(BATCHES)[:, None] % 2, found.sums, silent))
  all_of_them, every_other = align(found, truth, 1), align(half, truth, 1)
  counted = found._replace(sums=found.sums[1::2], units=found.units[1::2])
  of_the_others = align(counted, truth, 1).cosine.value
  assert abs(every_other.cosine.value - of_the_others / 2) < 1e-6
  assert 0 < every_other.adam_cosine.value < all_of_them.adam_cosine.value


def test_batches_are_pooled_by_sums_over_tokens():
  sums = np.array([[2.0], [4.0], [9.0], [0.0], [7.0]], np.float32)
  found = Gradients(sums, np.array([1.0, 3.0, 1.0, 2.0, 1.0]), np.ones(5), 1)
  np.testing.assert_allclose(found.pooled(2), [[1.5], [3.0]])


def test_adam_divides_by_the_root_of_the_second_moment():
  truth = np.array([[3.0, 0.0, 1.0], [4.0, 0.0, -1.0]], np.float32)
  np.testing.assert_allclose(adam_scale(truth), [1 / np.sqrt(12.5), 0, 1], rtol=1e-6)
