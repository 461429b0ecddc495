"""Log-probs and losses of tokens from hidden states, against dense ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.algorithms import losses
from spo_jax.algorithms.logprobs import token_logprobs, token_loss


@pytest.mark.parametrize("chunk, cap", [(1, None), (3, None), (16, None), (3, 2.0)])
def test_chunked_logprobs_equal_unchunked_ones(chunk, cap):
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(2, 7, 4)).astype(np.float32)
  unembed = rng.normal(size=(4, 11)).astype(np.float32)
  targets = rng.integers(0, 11, (2, 7)).astype(np.int32)
  weights = rng.normal(size=(2, 7)).astype(np.float32)

  def dense(hidden, unembed, temperature):
    logits = hidden @ unembed
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    logprobs = jax.nn.log_softmax(logits / temperature)
    return jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]

  def chunked(hidden, unembed, temperature):
    return token_logprobs(
      hidden, unembed, targets, chunk=chunk, temperature=temperature, logit_cap=cap
    )

  inputs = hidden, unembed, 0.6
  np.testing.assert_allclose(jax.jit(chunked)(*inputs), dense(*inputs), rtol=1e-5, atol=1e-6)
  grads = [
    jax.jit(jax.grad(lambda *x, fn=fn: jnp.sum(fn(*x) * weights), argnums=(0, 1, 2)))
    for fn in (chunked, dense)
  ]
  for got, want in zip(*[grad(*inputs) for grad in grads], strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_logits_of_all_tokens_never_exist():
  """Neither forward nor backward holds an array of T times V numbers."""
  hidden, unembed = jnp.zeros((1, 64, 4)), jnp.zeros((4, 512))
  targets, mask = jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64), bool)
  nll = lambda logprobs, mask, *_: losses.nll(logprobs, mask)
  for loss in (
    lambda h, u: token_logprobs(h, u, targets, chunk=8, temperature=1.0).sum(),
    lambda h, u: token_loss(nll, h, u, targets, mask, (), chunk=8, temperature=1.0)[0],
    lambda h, u: losses.forward_kl(
      h, u, hidden, unembed, mask, chunk=8, temperature=1.0, clip_min=-1.0, clip_max=1.0
    ),
  ):
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, unembed))
    assert "1,8,512]" in text
    assert "64,512]" not in text and "8,1,8,512]" not in text


def test_bfloat16_inputs_give_float32_logprobs():
  hidden = jnp.ones((1, 3, 4), jnp.bfloat16)
  unembed = jnp.linspace(-1, 1, 20, dtype=jnp.bfloat16).reshape(4, 5)
  got = token_logprobs(hidden, unembed, jnp.zeros((1, 3), jnp.int32), chunk=2, temperature=1.0)
  assert got.dtype == jnp.float32
  logits = unembed.astype(jnp.float32).sum(axis=0)
  np.testing.assert_allclose(got, jnp.full((1, 3), jax.nn.log_softmax(logits)[0]), rtol=1e-5)


B, T, D, V = 3, 7, 4, 11


def weighted_terms(logprobs, mask, weights, scalars):
  """A loss that bends, so that its gradient depends on the log-prob; calls and tokens to add up."""
  values = jnp.where(mask, scalars * weights * jnp.square(logprobs), 0)
  told = {"calls": jnp.ones(()), "tokens": jnp.sum(mask), "weights": jnp.sum(mask * weights)}
  return jnp.sum(values), told


def random_tokens(seed=0):
  rng = np.random.default_rng(seed)
  hidden, unembed = (rng.normal(size=size).astype(np.float32) for size in ((B, T, D), (D, V)))
  targets = rng.integers(0, V, (B, T)).astype(np.int32)
  weights = rng.normal(size=(B, T)).astype(np.float32)
  mask = rng.random((B, T)) < 0.6
  mask[1], mask[2] = False, True
  return hidden, unembed, targets, mask, weights


@functools.partial(jax.jit, static_argnames=("chunk", "cap"))
def loss_and_gradient(hidden, unembed, targets, mask, weights, chunk, cap=None):
  def loss(hidden, unembed):
    value, told = token_loss(
      weighted_terms,
      hidden,
      unembed,
      targets,
      mask,
      weights,
      jnp.float32(0.5),
      chunk=chunk,
      temperature=0.7,
      logit_cap=cap,
    )
    return 3 * value, told

  return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed)


@pytest.mark.parametrize("chunk, cap", [(1, None), (2, 2.0), (3, None), (16, None)])
def test_a_loss_of_tokens_and_its_gradient_equal_dense_ones(chunk, cap):
  hidden, unembed, targets, mask, weights = arrays = random_tokens()

  def dense(hidden, unembed):
    logits = hidden @ unembed
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    logprobs = jax.nn.log_softmax(logits / 0.7)
    taken = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return 3 * jnp.sum(0.5 * weights * jnp.square(taken) * mask)

  want, want_grads = jax.value_and_grad(dense, (0, 1))(hidden, unembed)
  (got, told), got_grads = loss_and_gradient(*arrays, chunk, cap)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(got_grads, want_grads, strict=True):
    assert np.any(b != 0)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  assert told["tokens"] == mask.sum()
  np.testing.assert_allclose(told["weights"], weights[mask].sum(), rtol=1e-5)


def test_as_many_chunks_run_as_the_fullest_row_fills():
  *arrays, mask, weights = random_tokens()
  for fullest, calls in ((0, 0), (1, 1), (2, 1), (3, 2), (T, 4)):
    mask = np.zeros((B, T), bool)
    mask[0, T - fullest :] = True  # the last, so that they must be gathered
    mask[2, :1] = fullest > 0
    (_, told), grads = loss_and_gradient(*arrays, mask, weights, chunk=2)
    assert told["calls"] == calls and told["tokens"] == mask.sum()
    assert np.any(grads[1]) == (fullest > 0)


def test_what_is_not_in_the_mask_reaches_no_gradient():
  hidden, *arrays, mask, weights = random_tokens()
  clean = loss_and_gradient(hidden, *arrays, mask, weights, chunk=3)
  for junk in (7.0, np.nan, np.inf):
    junk = np.float32(junk)
    poisoned = np.where(mask[..., None], hidden, junk), np.where(mask, weights, junk)
    (_, told), grads = loss_and_gradient(poisoned[0], *arrays, mask, weights, chunk=3)
    jax.tree.map(np.testing.assert_array_equal, (told, grads), (clean[0][1], clean[1]))
    (loss, _), grads = loss_and_gradient(hidden, *arrays, mask, poisoned[1], chunk=3)
    jax.tree.map(np.testing.assert_array_equal, (loss, grads), (clean[0][0], clean[1]))


def test_logits_are_computed_once():
  """Three products: logits, and the gradients of states and of the unembedding."""
  *arrays, mask, weights = random_tokens()
  text = str(jax.make_jaxpr(functools.partial(loss_and_gradient, chunk=3))(*arrays, mask, weights))
  assert text.count("dot_general") == 3


def test_a_loss_of_bfloat16_states_has_gradients_of_their_dtype():
  hidden, unembed, *rest = random_tokens()
  want, want_grads = loss_and_gradient(hidden, unembed, *rest, chunk=3)
  cast = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, unembed)]
  got, grads = loss_and_gradient(*cast, *rest, chunk=3)
  assert got[0].dtype == jnp.float32 and {x.dtype for x in grads} == {jnp.dtype("bfloat16")}
  np.testing.assert_allclose(got[0], want[0], rtol=0.05)
  for a, b in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.05 * np.abs(b).max())


def test_shapes_that_do_not_fit_raise():
  hidden, unembed, targets, mask, weights = random_tokens()
  for wrong in (
    (hidden, unembed[1:], targets, mask, weights),
    (hidden, unembed, targets, mask[:, 1:], weights),
    (hidden, unembed, targets, mask, weights[:1]),
    (hidden, unembed, targets, mask.astype(np.float32), weights),
  ):
    with pytest.raises(AssertionError):
      loss_and_gradient(*wrong, chunk=3)
