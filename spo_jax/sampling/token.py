"""Drawing one token: the only place where a distribution becomes a sample."""

import dataclasses

import chex
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How tokens are drawn; hashable, a static argument of jitted functions."""

  temperature: float = 1.0  # 0 is greedy
  top_k: int = 0  # 0 keeps all
  top_p: float = 1.0  # 1 keeps all


def token_distribution(logits_BxV: jax.Array, temperature: float) -> jax.Array:
  """log softmax(logits / temperature), float32: the log-probs that sampler and loss share."""
  return jax.nn.log_softmax(logits_BxV.astype(jnp.float32) / (temperature or 1.0), axis=-1)


def kept_tokens(logprobs_BxV: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
  """Tokens that truncation leaves: the `top_k` likeliest, then the fewest that reach mass `top_p`.

  Ties are broken towards the smaller token id. The likeliest token is always kept.

  Args:
    logprobs_BxV: [B, V] float32.
    top_k: 0 keeps all.
    top_p: in (0, 1]; 1 keeps all. The mass is that of the tokens left by `top_k`.

  Returns:
    [B, V] bool.
  """
  order_BxV = jnp.argsort(-logprobs_BxV, axis=-1, stable=True)
  rank_BxV = jnp.argsort(order_BxV, axis=-1)
  sorted_BxV = jnp.exp(jnp.take_along_axis(logprobs_BxV, order_BxV, axis=-1))
  if top_k:
    sorted_BxV = jnp.where(jnp.arange(sorted_BxV.shape[-1])[None] < top_k, sorted_BxV, 0.0)
  before_BxV = jnp.cumsum(sorted_BxV, axis=-1) - sorted_BxV
  kept_BxV = (before_BxV < top_p * sorted_BxV.sum(-1, keepdims=True)) & (sorted_BxV > 0)
  return jnp.take_along_axis(kept_BxV.at[:, 0].set(True), rank_BxV, axis=-1)


def sample_token(
  keys_B: jax.Array, logits_BxV: jax.Array, sampling: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
  """Draws a token a row by inverting the CDF at one uniform number, not by V Gumbel numbers.

  Args:
    keys_B: [B] typed PRNG keys; a row's draw depends on its own key alone.
    logits_BxV: [B, V].
    sampling: temperature, top-k and top-p, applied in this order.

  Returns:
    (tokens [B] int32, log-probs [B] float32). The log-prob is under `token_distribution`, before
    truncation by top-k and top-p: that is the distribution that the loss uses.
  """
  chex.assert_rank([keys_B, logits_BxV], [1, 2])
  logprobs_BxV = token_distribution(logits_BxV, sampling.temperature)
  if sampling.temperature == 0:
    tokens_B = jnp.argmax(logprobs_BxV, axis=-1).astype(jnp.int32)
  else:
    mass_BxV = jnp.exp(logprobs_BxV)
    if sampling.top_k or sampling.top_p < 1:
      kept_BxV = kept_tokens(logprobs_BxV, top_k=sampling.top_k, top_p=sampling.top_p)
      mass_BxV = jnp.where(kept_BxV, mass_BxV, 0.0)
    # The sum is rounded in blocks, so not quite flat over tokens without mass: leave them out.
    cdf_BxV = jnp.where(mass_BxV > 0, jnp.cumsum(mass_BxV, axis=-1), 0.0)
    uniform_B = jax.vmap(jax.random.uniform)(keys_B)
    above_BxV = cdf_BxV > uniform_B[:, None] * cdf_BxV.max(-1, keepdims=True)
    tokens_B = jnp.argmax(above_BxV, axis=-1).astype(jnp.int32)
  return tokens_B, jnp.take_along_axis(logprobs_BxV, tokens_B[:, None], axis=-1)[:, 0]
