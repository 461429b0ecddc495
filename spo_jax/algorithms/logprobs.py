"""From hidden states to log-probs of tokens, and to losses of them, without all logits at once.

Axis letters: B rows, T tokens (or as many places as a loss has), C tokens of a chunk, D width, V
vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from spo_jax.numerics import pick, soft_cap


def token_logprobs(
  hidden: jax.Array,
  unembed: jax.Array,
  targets: jax.Array,
  *,
  chunk: int,
  temperature: float | jax.Array,
  logit_cap: float | None = None,
) -> jax.Array:
  """log softmax(hidden · unembed / temperature)[target] without a [B, T, V] array.

  Runs over chunks of tokens and computes each chunk's logits again in the backward pass, so the
  peak is [B, chunk, V] float32 both ways. The gradient of unembed is summed over chunks in the
  dtype of unembed.

  Args:
    hidden: [B, T, D] float, the state that predicts the target at the same index.
    unembed: [D, V] float.
    targets: [B, T] int32 in [0, V); mask what has no target afterwards.
    chunk: most tokens of a row that are unembedded at a time; T is cut into chunks of one size.
    temperature: that of sampling, so that these are the behaviour policy's log-probabilities.
    logit_cap: soft cap of the logits, before the temperature; None: they have none.

  Returns:
    [B, T] float32.
  """
  chex.assert_rank([hidden, unembed, targets], [3, 2, 2])
  dims = chex.Dimensions(B=hidden.shape[0], T=hidden.shape[1], D=hidden.shape[2])
  chex.assert_shape(targets, dims["BT"])
  chex.assert_axis_dimension(unembed, 0, dims["D"][0])
  chex.assert_type(targets, int)

  def chunk_logprobs(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    states, labels = inputs  # [B, C, D], [B, C]
    return _chunk_logprobs(logit_cap, states, unembed, temperature, labels)

  return map_chunks(chunk_logprobs, (hidden, targets), chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_logprobs(logit_cap: float | None, states, unembed, temperature, labels) -> jax.Array:
  """[B, C] log-probs of labels; the backward pass knows their gradient, and keeps no logits."""
  return _chunk_forward(logit_cap, states, unembed, temperature, labels)[0]


def _chunk_forward(logit_cap, states, unembed, temperature, labels):
  logits = _scaled(_products(states, unembed), temperature, logit_cap)
  logprobs, log_sum = _taken(logits, labels)
  return logprobs, (states, unembed, temperature, labels, log_sum)


def _chunk_backward(logit_cap, kept, d_logprobs):
  states, unembed, temperature, labels, log_sum = kept
  products = _products(states, unembed)
  scale = lambda products, temperature: _scaled(products, temperature, logit_cap)
  logits, pull = jax.vjp(scale, products, temperature)
  d_products, d_temperature = pull(_logits_gradient(logits, log_sum, labels, d_logprobs))
  return *_products_gradient(states, unembed, d_products), d_temperature, None


_chunk_logprobs.defvjp(_chunk_forward, _chunk_backward)


def token_loss(
  loss_fn: Callable[..., tuple[jax.Array, Any]],
  hidden: jax.Array,
  unembed: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  columns: Any,
  scalars: Any = None,
  *,
  chunk: int,
  temperature: float,
  logit_cap: float | None = None,
) -> tuple[jax.Array, Any]:
  """A sum over tokens of a loss of their log-probs, whose gradient is taken in the same pass.

  What a token adds to the loss depends on its own log-prob alone, so a chunk's gradient is known as
  soon as its logits are: they are computed once, where `token_logprobs` computes them again in the
  backward pass. Only tokens in the mask are unembedded: those of a row are gathered, and as many
  chunks run as the row with the most of them fills.

  The peak is [B, chunk, V] float32, and the gradient of unembed, summed over chunks in its dtype.

  Args:
    loss_fn: (logprobs [B, C] float32, mask [B, C] bool, columns, scalars) -> (scalar float32,
      pytree of scalars), sums over the mask, for any C of the tokens. The pytree has no gradient.
    hidden: [B, T, D] float, the state that predicts the target at the same index.
    unembed: [D, V] float.
    targets: [B, T] int32 in [0, V).
    mask: [B, T] bool, tokens in the sum.
    columns: pytree of [B, T] arrays, what else the loss reads of a token; without a gradient.
    scalars: pytree of what it reads beside them, likewise.
    chunk: most tokens of a row that are unembedded at a time.
    temperature: as in `token_logprobs`.
    logit_cap: likewise.

  Returns:
    What `loss_fn` returns, summed over all tokens of the mask.
  """
  chex.assert_rank([hidden, unembed, targets], [3, 2, 2])
  chex.assert_equal_shape_prefix([hidden, targets, mask, *jax.tree.leaves(columns)], 2)
  chex.assert_axis_dimension(unembed, 0, hidden.shape[2])
  chex.assert_type([targets, mask], [int, bool])
  statics = (loss_fn, min(chunk, targets.shape[1]), temperature, logit_cap)
  return _token_loss(statics, hidden, unembed, targets, mask, columns, scalars)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_loss(statics, *arrays):
  return _token_loss_forward(statics, *arrays)[0]


def _token_loss_forward(statics, hidden, unembed, targets, mask, columns, scalars):
  """(loss and sums, gradients of hidden and unembed)."""
  loss_fn, chunk, temperature, logit_cap = statics
  B, T = targets.shape
  used_B = jnp.sum(mask, axis=1)
  order_BxT = jnp.argsort(~mask, axis=1, stable=True)
  order_BxT = jnp.pad(order_BxT, ((0, 0), (0, -T % chunk)))
  scale = lambda products: _scaled(products, temperature, logit_cap)

  def chunk_gradient(start):
    places_BxC = jax.lax.dynamic_slice_in_dim(order_BxT, start, chunk, axis=1)
    mask_BxC = start + jnp.arange(chunk)[None] < used_B[:, None]
    states, labels, of_tokens = jax.tree.map(
      lambda x: pick(x, places_BxC), (hidden, targets, columns)
    )
    # What is not in the mask may be no number.
    states = jnp.where(mask_BxC[..., None], states, 0)
    logits, pull = jax.vjp(scale, _products(states, unembed))
    logprobs, log_sum = _taken(logits, labels)
    loss, pull_loss, sums = jax.vjp(
      lambda logprobs: loss_fn(logprobs, mask_BxC, of_tokens, scalars), logprobs, has_aux=True
    )
    (d_logprobs,) = pull_loss(jnp.ones_like(loss))
    d_logprobs = jnp.where(mask_BxC, d_logprobs, 0)
    (d_products,) = pull(_logits_gradient(logits, log_sum, labels, d_logprobs))
    return (loss, sums), *_products_gradient(states, unembed, d_products)

  def add(i, carry):
    total, d_hidden, d_unembed = carry
    told, d_states, d_unembed_here = chunk_gradient(i * chunk)
    total = jax.tree.map(jnp.add, total, told)
    d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, d_states, i * chunk, axis=1)
    return total, d_hidden, d_unembed + d_unembed_here

  told, *_ = jax.eval_shape(chunk_gradient, 0)
  zeros = lambda x: jnp.zeros(x.shape, x.dtype)
  d_hidden = jnp.zeros((B, order_BxT.shape[1], hidden.shape[2]), hidden.dtype)
  begin = (jax.tree.map(zeros, told), d_hidden, zeros(unembed))
  chunks = -(-jnp.max(used_B) // chunk)
  told, d_hidden, d_unembed = jax.lax.fori_loop(0, chunks, add, begin)
  rank_BxT = jnp.cumsum(mask, axis=1) - 1  # of a token among those of the mask
  d_hidden = jnp.where(mask[..., None], pick(d_hidden, jnp.maximum(rank_BxT, 0)), 0)
  return told, (d_hidden, d_unembed)


def _token_loss_backward(statics, gradients, d_told):
  del statics
  d_loss, _ = d_told
  d_hidden, d_unembed = (d_loss.astype(x.dtype) * x for x in gradients)
  return d_hidden, d_unembed, None, None, None, None


_token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def chunk_logits(
  states: jax.Array,
  unembed: jax.Array,
  temperature: float | jax.Array,
  logit_cap: float | None,
) -> jax.Array:
  """[B, C, D], [D, V] -> [B, C, V] float32."""
  return _scaled(_products(states, unembed), temperature, logit_cap)


def _products(states, unembed) -> jax.Array:
  return jnp.einsum("bcd,dv->bcv", states, unembed, preferred_element_type=jnp.float32)


def _scaled(products, temperature, logit_cap: float | None) -> jax.Array:
  return soft_cap(products, logit_cap) / temperature


def _taken(logits, labels) -> tuple[jax.Array, jax.Array]:
  """[B, C] log-probs of labels, and what softmax divides by, as a log."""
  log_sum = jax.nn.logsumexp(logits, axis=-1)
  taken = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return taken - log_sum, log_sum


def _logits_gradient(logits, log_sum, labels, d_logprobs) -> jax.Array:
  """[B, C, V]; written so that all of it is one pass over the logits."""
  chosen = jnp.arange(logits.shape[-1])[None, None] == labels[..., None]
  return d_logprobs[..., None] * (chosen - jnp.exp(logits - log_sum[..., None]))


def _products_gradient(states, unembed, d_products) -> tuple[jax.Array, jax.Array]:
  """Gradients of states and unembed."""
  d_products = d_products.astype(states.dtype)
  d_states = jnp.einsum("bcv,dv->bcd", d_products, unembed).astype(states.dtype)
  d_unembed = jnp.einsum("bcd,bcv->dv", states, d_products).astype(unembed.dtype)
  return d_states, d_unembed


def map_chunks(
  fn: Callable[[tuple[jax.Array, ...]], jax.Array], inputs: tuple[jax.Array, ...], chunk: int
) -> jax.Array:
  """fn of arrays [B, C, ...] -> [B, C], over the chunks of arrays [B, T, ...] -> [B, T]."""
  rows, length = inputs[0].shape[:2]
  num_chunks = -(-length // chunk)
  size = -(-length // num_chunks)

  def split(x: jax.Array) -> jax.Array:
    rest = x.shape[2:]
    padding = [(0, 0), (0, num_chunks * size - length)] + [(0, 0)] * len(rest)
    return jnp.pad(x, padding).reshape(rows, num_chunks, size, *rest).swapaxes(0, 1)

  mapped = jax.lax.map(fn, tuple(split(x) for x in inputs))
  return mapped.swapaxes(0, 1).reshape(rows, -1)[:, :length]
