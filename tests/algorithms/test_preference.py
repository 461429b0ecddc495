import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.algorithms import preference

HYPER = dict(beta=0.3, penalty=5.0)


def _pairs(seed=0, size=8):
  """Log-probabilities of chosen and rejected responses, under the policy and the reference."""
  rng = np.random.default_rng(seed)
  return tuple(rng.uniform(-9, -1, size).astype(np.float32) for _ in range(4))


def _every(pairs):
  return np.ones(len(pairs[0]), bool)


def test_loss_against_plain_numpy():
  pairs = _pairs()
  valid = np.arange(8) % 3 > 0
  loss, ordered, lowered = 0.0, 0, 0
  for c, r, rc, rr in np.array(pairs, np.float64).T[valid]:
    margin = (c - rc) - (r - rr) - HYPER["penalty"] * max(0, rc - c)
    loss += -np.log(1 / (1 + np.exp(-HYPER["beta"] * margin)))
    ordered += c - rc > r - rr
    lowered += c < rc
  sums = jax.jit(lambda *x: preference.dpo_positive(*x, **HYPER))(*pairs, valid)
  np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
  assert (sums.count, sums.ordered, sums.lowered) == (valid.sum(), ordered, lowered)
  assert 0 < ordered < valid.sum() and 0 < lowered < valid.sum()


def test_without_penalty_it_is_dpo():
  chosen, rejected, ref_chosen, ref_rejected = pairs = _pairs()
  plain = preference.dpo_positive(*pairs, _every(pairs), beta=0.3, penalty=0.0).loss
  logits = 0.3 * ((chosen - rejected) - (ref_chosen - ref_rejected))
  np.testing.assert_allclose(plain, np.sum(np.log1p(np.exp(-logits))), rtol=1e-5)
  # Nor does the penalty matter where no chosen response has become less likely.
  risen = (np.maximum(chosen, ref_chosen), *pairs[1:])
  with_penalty, without = (
    preference.dpo_positive(*risen, _every(pairs), beta=0.3, penalty=p).loss for p in (5.0, 0.0)
  )
  assert with_penalty == without != plain


def test_at_the_reference_the_loss_is_log_2_and_the_gradient_that_of_dpo():
  _, _, chosen, rejected = pairs = _pairs()
  every = _every(pairs)

  def loss(c, r, penalty):
    return preference.dpo_positive(c, r, chosen, rejected, every, beta=0.3, penalty=penalty).loss

  np.testing.assert_allclose(loss(chosen, rejected, 5.0), 8 * np.log(2), rtol=1e-6)
  grads = jax.grad(loss, argnums=(0, 1))(chosen, rejected, 5.0)
  np.testing.assert_allclose(grads, [[-0.15] * 8, [0.15] * 8], rtol=1e-6)
  jax.tree.map(
    np.testing.assert_array_equal, grads, jax.grad(loss, argnums=(0, 1))(chosen, rejected, 0.0)
  )


def test_gradients_raise_the_chosen_and_lower_the_rejected():
  chosen, rejected, *refs = pairs = _pairs()

  def loss(c, r, penalty):
    return preference.dpo_positive(c, r, *refs, _every(pairs), beta=0.3, penalty=penalty).loss

  up, down = jax.grad(loss, argnums=(0, 1))(chosen, rejected, 5.0)
  assert np.all(up < 0) and np.all(down > 0)
  # A chosen response that has become less likely weighs 1 + penalty times as much as its partner.
  lowered = chosen < refs[0]
  np.testing.assert_allclose(-up / down, np.where(lowered, 6, 1), rtol=1e-5)


def test_padding_does_not_matter():
  pairs = _pairs()
  valid = np.arange(8) < 5
  run = jax.jit(
    jax.value_and_grad(
      lambda *x: preference.dpo_positive(*x, valid, **HYPER).loss, argnums=(0, 1, 2, 3)
    )
  )
  clean = run(*pairs)
  assert clean[0] > 0
  for junk in (1e9, np.nan, -np.inf):
    dirty = [np.where(valid, x, np.float32(junk)) for x in pairs]
    jax.tree.map(np.testing.assert_array_equal, run(*dirty), clean)
  sums = preference.dpo_positive(*pairs, np.zeros(8, bool), **HYPER)
  np.testing.assert_array_equal(sums, np.zeros(4))


def test_sequences_are_summed_by_id():
  logprobs = np.array([[-1.0, -2.0, np.nan, -4.0], [-8.0, np.nan, -16.0, -32.0]], np.float32)
  sequence = np.array([[0, 0, -1, 3], [3, -1, 1, 1]], np.int32)
  fn = lambda x: preference.sequence_logprobs(x, sequence, num_sequences=5)
  np.testing.assert_array_equal(jax.jit(fn)(logprobs), [-3, -48, 0, -12, 0])
  weights = jnp.arange(1.0, 6.0)
  grad = jax.grad(lambda x: jnp.sum(fn(x) * weights))(logprobs)
  np.testing.assert_array_equal(grad, [[1, 1, 0, 4], [4, 0, 2, 2]])
  assert fn(logprobs.astype(jnp.bfloat16)).dtype == jnp.float32


def test_bad_shapes_raise():
  pairs = _pairs()
  with pytest.raises(AssertionError):
    preference.dpo_positive(*pairs, np.ones(7, bool), **HYPER)
  with pytest.raises(AssertionError):
    preference.dpo_positive(*pairs, np.ones(8, np.float32), **HYPER)
  with pytest.raises(AssertionError):
    preference.sequence_logprobs(pairs[0], np.zeros(8, np.int32), num_sequences=1)
