"""One Linen decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU) for training, prefill and
decode.

The three uses differ in attention alone, so attention is an argument: `attend(q, k, v, context,
cache)` returns the mixed values and the layer's new cache. `models/attention.py` has the three of
them.

Axis letters: B rows, T tokens, D width, H heads, K key-value heads, Dh head dimension, F
feed-forward, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Attend = Callable[..., tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Geometry of a decoder; hashable, so that it is a static argument of jitted functions."""

  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  ffn: int
  rope_theta: float  # base of the rotary frequencies
  norm_eps: float
  tie_embeddings: bool  # the unembedding is the transposed embedding
  dtype: str  # of activations and matmuls; parameters are always float32
  remat: bool  # recompute each block in the backward pass instead of keeping its activations


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32."""

  eps: float
  dtype: str

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    scale_D = self.param(
      "scale", nn.with_partitioning(nn.initializers.ones, ("width",)), x_BxTxD.shape[-1:]
    )
    x_BxTxD = x_BxTxD.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_BxTxD), axis=-1, keepdims=True)
    normed_BxTxD = x_BxTxD * jax.lax.rsqrt(mean_square + self.eps)
    return (normed_BxTxD * scale_D[None, None]).astype(self.dtype)


def rotate(x_BxTxHxDh: jax.Array, positions_BxT: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding over the two halves of the head dimension, in float32."""
  half = x_BxTxHxDh.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions_BxT[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x_BxTxHxDh.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxHxDh.dtype)


def fan_in_init(*fan_in_axes: int) -> nn.initializers.Initializer:
  """Truncated normal with variance 1 / fan-in, the fan-in being the product of the given axes."""

  def init(key, shape, dtype=jnp.float32):
    fan_in = 1
    for axis in fan_in_axes:
      fan_in *= shape[axis]
    return nn.initializers.truncated_normal(fan_in**-0.5)(key, shape, dtype)

  return init


class Block(nn.Module):
  """Pre-norm attention and SwiGLU, each with a residual."""

  cfg: DecoderConfig
  attend: Attend

  def _weight(self, name, shape, axes, fan_in_axes=(0,)):
    init = nn.with_partitioning(fan_in_init(*fan_in_axes), axes)
    return self.param(name, init, shape).astype(self.cfg.dtype)

  @nn.compact
  def __call__(self, x_BxTxD, positions_BxT, context, cache):
    c = self.cfg
    h_BxTxD = RMSNorm(c.norm_eps, c.dtype, name="attention_norm")(x_BxTxD)
    wq = self._weight("query", (c.width, c.heads, c.head_dim), ("width", "heads", None))
    wk = self._weight("key", (c.width, c.kv_heads, c.head_dim), ("width", "kv_heads", None))
    wv = self._weight("value", (c.width, c.kv_heads, c.head_dim), ("width", "kv_heads", None))
    wo = self._weight("out", (c.heads, c.head_dim, c.width), ("heads", None, "width"), (0, 1))
    q_BxTxHxDh = rotate(jnp.einsum("btd,dhk->bthk", h_BxTxD, wq), positions_BxT, c.rope_theta)
    k_BxTxKxDh = rotate(jnp.einsum("btd,dhk->bthk", h_BxTxD, wk), positions_BxT, c.rope_theta)
    v_BxTxKxDh = jnp.einsum("btd,dhk->bthk", h_BxTxD, wv)
    mixed_BxTxHxDh, cache = self.attend(q_BxTxHxDh, k_BxTxKxDh, v_BxTxKxDh, context, cache)
    x_BxTxD = x_BxTxD + jnp.einsum("bthk,hkd->btd", mixed_BxTxHxDh, wo)

    h_BxTxD = RMSNorm(c.norm_eps, c.dtype, name="mlp_norm")(x_BxTxD)
    gate = self._weight("gate", (c.width, c.ffn), ("width", "ffn"))
    up = self._weight("up", (c.width, c.ffn), ("width", "ffn"))
    down = self._weight("down", (c.ffn, c.width), ("ffn", "width"))
    f_BxTxF = nn.silu(h_BxTxD @ gate) * (h_BxTxD @ up)
    return x_BxTxD + f_BxTxF @ down, cache


class Decoder(nn.Module):
  """Tokens to final hidden states; the unembedding is left to the caller (see `unembedding`)."""

  cfg: DecoderConfig
  attend: Attend

  @nn.compact
  def __call__(self, tokens_BxT, positions_BxT, context, caches):
    """Runs the blocks.

    Args:
      tokens_BxT: [B, T] int32.
      positions_BxT: [B, T] int32, distance from the root of the token's tree.
      context: what `attend` needs and all layers share, a pytree of arrays.
      caches: one pytree a layer, or None for every layer.

    Returns:
      (hidden states after the last norm [B, T, D], tuple of the layers' new caches).
    """
    c = self.cfg
    init = nn.with_partitioning(nn.initializers.truncated_normal(c.width**-0.5), ("vocab", "width"))
    embedding_VxD = self.param("embedding", init, (c.vocab_size, c.width))
    if not c.tie_embeddings:
      init = nn.with_partitioning(fan_in_init(0), ("width", "vocab"))
      self.param("unembedding", init, (c.width, c.vocab_size))
    x_BxTxD = embedding_VxD.astype(c.dtype)[tokens_BxT]
    block = nn.remat(Block) if c.remat else Block
    new_caches = []
    for layer in range(c.layers):
      cache = None if caches is None else caches[layer]
      x_BxTxD, cache = block(c, self.attend, name=f"block_{layer}")(
        x_BxTxD, positions_BxT, context, cache
      )
      new_caches.append(cache)
    return RMSNorm(c.norm_eps, c.dtype, name="final_norm")(x_BxTxD), tuple(new_caches)


def forward(cfg, attend, params, tokens_BxT, positions_BxT, context=None, caches=None):
  """Applies the decoder with the given attention: see `Decoder.__call__`."""
  return Decoder(cfg, attend).apply({"params": params}, tokens_BxT, positions_BxT, context, caches)


def unembedding(cfg: DecoderConfig, params) -> jax.Array:
  """The [D, V] matrix that turns hidden states into logits."""
  return params["embedding"].T if cfg.tie_embeddings else params["unembedding"]


def init_params(cfg: DecoderConfig, key: jax.Array):
  """Random float32 parameters, each boxed with its logical axis names (`nn.Partitioned`)."""
  attend = lambda q, k, v, context, cache: (q, cache)
  tokens = jnp.zeros((1, 1), jnp.int32)
  return Decoder(cfg, attend).init(key, tokens, tokens, None, None)["params"]


def count_params(params) -> int:
  """Number of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
