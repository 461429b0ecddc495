import functools

import jax
import numpy as np
import pytest

from spo_jax.algorithms import critic
from tests.algorithms import reference

_value_loss = jax.jit(critic.value_loss)


@jax.jit
def _loss_and_grad(values, old_values, returns, mask, *, value_clip):
  def mean(values):
    sums = critic.value_loss(values, old_values, returns, mask, value_clip=value_clip)
    return sums.loss / sums.count, sums

  (loss, sums), grad = jax.value_and_grad(mean, has_aux=True)(values)
  return loss, sums, grad


def test_losses_of_the_reference(fixture_arrays):
  data = fixture_arrays("critic_loss")
  for case in reference.load_json("critic_loss"):
    given = {k: data[f"{case['case']}__{k}"] for k in (
      "old_values", "new_values", "returns", "action_mask", "loss", "grad_new_values")}  # fmt: skip
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, err_msg=case["case"])
    loss, sums, grad = _loss_and_grad(
      given["new_values"][:, :-1],
      given["old_values"],
      given["returns"],
      given["action_mask"] > 0,
      value_clip=case["cliprange_value"],
    )
    close(loss, given["loss"])
    close(loss, case["loss"])
    close(grad, given["grad_new_values"][:, :-1], atol=1e-8)
    np.testing.assert_array_equal(given["grad_new_values"][:, -1], 0)
    metrics = {
      "critic/value": sums.values,
      "critic/mse": sums.squared_error,
      "critic/clip_frac": sums.clipped,
    }
    assert metrics.keys() == case["metrics"].keys()
    for name, total in metrics.items():
      close(total / sums.count, case["metrics"][name], atol=1e-7)


def _random_batch(seed=0, shape=(4, 9)):
  rng = np.random.default_rng(seed)
  values, noise, returns = rng.normal(size=(3, *shape)).astype(np.float32)
  return values, values + 0.3 * noise, returns, rng.random(shape) < 0.6


def test_without_clipping_it_is_half_the_squared_error():
  values, old, returns, mask = _random_batch()
  loss, sums, grad = _loss_and_grad(values, old, returns, mask, value_clip=np.inf)
  error = (values - returns) * mask
  np.testing.assert_allclose(loss, np.mean(error[mask] ** 2) / 2, rtol=1e-5)
  np.testing.assert_allclose(sums.loss, sums.squared_error / 2, rtol=1e-6)
  np.testing.assert_allclose(grad, error / mask.sum(), rtol=1e-5)
  assert sums.clipped == 0


def test_gradients_around_the_clip():
  """Whole up to the bound, 0 beyond it towards the return, whole again away from the return."""
  values = np.array([[0.25, 0.5, 0.75, -0.75]], np.float32)
  zeros, returns = np.zeros_like(values), np.full_like(values, 2.0)
  *_, grad = _loss_and_grad(values, zeros, returns, np.ones_like(values, bool), value_clip=0.5)
  np.testing.assert_array_equal(grad * 4, (values - returns) * [[1, 1, 0, 1]])


def test_sums_are_those_of_a_loop():
  batch = _random_batch(1)
  value_clip = 0.1
  want = np.zeros(len(critic.ValueSums._fields))
  for v, old, g, m in zip(*[x.ravel() for x in batch], strict=True):
    if m:
      near = min(max(v, old - value_clip), old + value_clip)
      error, near_error = (v - g) ** 2, (near - g) ** 2
      want += [max(error, near_error) / 2, 1, error, near_error > error, v, g, g * g]
  np.testing.assert_allclose(_value_loss(*batch, value_clip=value_clip), want, rtol=1e-5)
  assert 0 < want[3] < want[1]
  halves = [_value_loss(*[x[s] for x in batch], value_clip=value_clip) for s in np.s_[:2, 2:]]
  np.testing.assert_allclose(np.sum(halves, axis=0), want, rtol=1e-5)


def test_nothing_outside_the_mask_matters():
  values, old, returns, mask = _random_batch()
  clean = _loss_and_grad(values, old, returns, mask, value_clip=0.2)
  np.testing.assert_array_equal(clean[2][~mask], 0)
  for junk in (np.nan, -1e9, np.inf):
    dirty = [np.where(mask, x, np.float32(junk)) for x in (values, old, returns)]
    got = _loss_and_grad(*dirty, mask, value_clip=0.2)
    jax.tree.map(np.testing.assert_array_equal, got, clean)
  none = _value_loss(values, old, returns, np.zeros_like(mask), value_clip=0.2)
  np.testing.assert_array_equal(none, 0)
  assert critic.explained_variance(none) == 0


def _explained(values, returns, mask):
  sums = _value_loss(values, values, returns, mask, value_clip=np.inf)
  return float(critic.explained_variance(sums))


def test_explained_variance():
  values, _, returns, mask = _random_batch(2)
  mean = returns[mask].mean()
  explained = lambda x: _explained(np.broadcast_to(x, returns.shape), returns, mask)
  np.testing.assert_allclose(explained(returns), 1)
  np.testing.assert_allclose(explained(mean), 0, atol=1e-6)
  half = (returns + mean) / 2
  np.testing.assert_allclose(explained(half), 0.75, rtol=1e-5)
  # One deviation of bias costs as much as knowing nothing.
  np.testing.assert_allclose(explained(returns + returns[mask].std()), 0, atol=1e-5)
  residual = returns - values
  want = 1 - np.mean(residual[mask] ** 2) / returns[mask].var()
  np.testing.assert_allclose(explained(values), want, rtol=1e-5)
  assert want < 1 - residual[mask].var() / returns[mask].var()


def test_returns_that_do_not_vary_explain_nothing():
  mask = np.ones((4, 64), bool)
  for constant in (0.0, 1.0, 0.1, 0.3, 0.7, -1 / 3):
    returns = np.full(mask.shape, constant, np.float32)
    assert _explained(returns + 1, returns, mask) == 0


def test_one_wrong_answer_in_thousands_of_tokens_is_variation():
  mask = np.ones((4, 1024), bool)
  returns = np.ones(mask.shape, np.float32)
  returns[0, 0] = 0
  np.testing.assert_allclose(_explained(returns, returns, mask), 1)
  np.testing.assert_allclose(_explained(np.ones_like(returns), returns, mask), 0, atol=1e-3)


def test_bad_shapes_and_types_raise():
  values, old, returns, mask = _random_batch()
  with pytest.raises(AssertionError):
    critic.value_loss(values, old, returns[:, 1:], mask, value_clip=0.2)
  with pytest.raises(AssertionError):
    critic.value_loss(values, old, returns, mask.astype(np.float32), value_clip=0.2)
