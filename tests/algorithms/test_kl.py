import jax
import numpy as np
import pytest

from spo_jax.algorithms import kl


@pytest.mark.parametrize("name", sorted(kl.KL_ESTIMATORS))
def test_estimators_of_the_reference(fixture_arrays, name):
  data = fixture_arrays("kl_penalty")
  estimator = kl.KL_ESTIMATORS[name]
  grad = jax.jit(jax.grad(lambda logprobs, ref: estimator(logprobs, ref).sum()))
  inputs = [key for key in ("plain", "extreme", "full") if f"{key}__{name}" in data]
  assert inputs
  for key in inputs:
    arrays = data[f"{key}__logprob"], data[f"{key}__ref_logprob"]
    value = jax.jit(estimator)(*arrays)
    np.testing.assert_allclose(value, data[f"{key}__{name}"], rtol=2e-4, atol=1e-5)
    want = data[f"{key}__{name}__grad_of_sum"]
    np.testing.assert_allclose(grad(*arrays), want, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(estimator(*[x[:1] for x in arrays]), value[:1], rtol=1e-6)


def test_every_fixture_estimator_has_a_test(fixture_arrays):
  gradients = [key for key in fixture_arrays("kl_penalty") if key.endswith("__grad_of_sum")]
  assert {key.split("__")[1] for key in gradients} == set(kl.KL_ESTIMATORS)


def test_estimators_vanish_on_equal_policies():
  logprobs = np.log(np.full((2, 3, 4), 0.25, np.float32))
  for name, estimator in kl.KL_ESTIMATORS.items():
    x = logprobs if name == "full" else logprobs[..., 0]
    np.testing.assert_allclose(estimator(x, x), np.zeros((2, 3)), atol=1e-7)


def test_unbiased_estimators_average_to_the_exact_divergence():
  """Over all tokens of a vocabulary, Σᵥ πᵥ k(v) = KL(π, π_ref) for k1 and k3."""
  rng = np.random.default_rng(0)
  logprobs, ref = (jax.nn.log_softmax(rng.normal(size=(1, 9))) for _ in range(2))
  exact = kl.full(logprobs[None], ref[None])[0, 0]
  for name in ("kl", "control_variate"):
    mean = np.sum(np.exp(logprobs) * kl.KL_ESTIMATORS[name](logprobs, ref))
    np.testing.assert_allclose(mean, exact, rtol=1e-5)


def test_clip_passes_the_gradient_on_its_bounds():
  x = np.array([-2.0, -1.0, 0.0, 1.0, 2.0], np.float32)
  value, grad = jax.vmap(jax.value_and_grad(lambda v: kl.clip(v, -1.0, 1.0)))(x)
  np.testing.assert_array_equal(value, [-1, -1, 0, 1, 1])
  np.testing.assert_array_equal(grad, [0, 1, 1, 1, 0])
