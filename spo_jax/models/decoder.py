"""One Linen decoder for the Llama, Mistral, Qwen and Gemma families: training, prefill and decode.

The three uses differ in attention alone, so attention is an argument: `attend(q, k, v, positions,
context, cache, spec)` returns the mixed values and the layer's new cache. `models/attention/` has
the three of them. `models/families.py` makes a `DecoderConfig` of a Hugging Face config.

Axis letters: B rows, T tokens, D width, H heads, K key-value heads, Dh head dimension, F
feed-forward, V vocabulary, R positions of a row that are read.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spo_jax.infra.mesh import (
  gather_rows,
  gather_weight,
  split_channels,
  split_rows,
)
from spo_jax.models.attention import ATTENTION, AttentionSpec
from spo_jax.models.product import product
from spo_jax.models.rope import Rope, rotary_tables, rotate, take_tables
from spo_jax.numerics import pick, soft_cap

Attend = Callable[..., tuple[jax.Array, Any]]

_EMBEDDING_AXES = ("vocab", "width")
NORM_SCALE = "scale"  # name of a norm's parameter
# Behind the name of a weight: its scales, beside the weight where that is quantised; see
# `decode_weights`.
SCALES = "_scales"

_DOTS = jax.checkpoint_policies.save_from_both_policies(
  jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  jax.checkpoint_policies.save_only_these_names(ATTENTION),
)
# What becomes of a block: all of its activations are kept for the backward pass; its input alone;
# also the products with weights, and what attention needs so as not to be computed twice.
REMATS = {
  "none": lambda block: block,
  "blocks": nn.remat,
  "dots": functools.partial(nn.remat, policy=_DOTS),
}

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": lambda x: nn.gelu(x, approximate=True)}


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """In what layers of a model differ from one another."""

  rope: Rope
  window: int | None = None  # a query sees its last `window` positions; None: all


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Geometry of a decoder; hashable, so that it is a static argument of jitted functions.

  The fields with defaults are those in which families depart from Llama.
  """

  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  ffn: int
  layer_kinds: tuple[LayerKind, ...]  # layer i is of kind i modulo their number
  norm_eps: float
  tie_embeddings: bool  # the unembedding is the transposed embedding
  dtype: str  # of activations and matmuls; parameters are always float32
  remat: str  # what is computed anew in the backward pass, a key of REMATS
  activation: str = "silu"  # of the feed-forward gate, a key of ACTIVATIONS
  qkv_bias: bool = False  # queries, keys and values have biases
  qk_norm: bool = False  # queries and keys are normalised, per head, before they are rotated
  post_norms: bool = False  # attention and feed-forward are normalised once more, before they add
  unit_offset_norms: bool = False  # norms multiply by 1 + scale
  embedding_scale: float = 1.0  # of the embedding where it enters the first block
  query_scale: float | None = None  # of the products of queries and keys; None: head_dim ** -0.5
  attention_cap: float | None = None  # soft cap of those scaled products
  attention: str = "blocks"  # who computes attention, of attention.BACKENDS
  scan_layers: bool = False  # layers are a loop where they have no cache: it compiles faster
  logit_cap: float | None = None  # soft cap of the logits
  # Weights are gathered where they are used, as `infra.mesh.gather_weight` tells; None: they stay.
  gather: Mesh | None = None
  mesh: Mesh | None = None  # that attention is split over, for `AttentionSpec`
  spread: Mesh | None = None  # weights are those of `decode_weights`, and rows go to them

  def on(self, mesh: Mesh) -> "DecoderConfig":
    """This decoder for training and prefill on a mesh: where fsdp splits weights, they are
    gathered."""
    gather = mesh if mesh.shape["fsdp"] > 1 else None
    return dataclasses.replace(self, gather=gather, mesh=mesh)

  def for_decode(self) -> "DecoderConfig":
    """This decoder for steps of few tokens, which are cheaper to send than weights: those stay."""
    return dataclasses.replace(self, gather=None, spread=self.gather)

  def layer_kind(self, layer: int) -> LayerKind:
    """The kind of a layer."""
    return self.layer_kinds[layer % len(self.layer_kinds)]

  def attention_spec(self, kind: LayerKind) -> AttentionSpec:
    """What attention does in layers of a kind."""
    scale = self.head_dim**-0.5 if self.query_scale is None else self.query_scale
    return AttentionSpec(scale, kind.window, self.attention_cap, self.attention, self.mesh)


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis, in float32."""

  cfg: DecoderConfig
  axis: str | None = "width"  # logical name of the axis

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.cfg
    start = nn.initializers.zeros if c.unit_offset_norms else nn.initializers.ones
    scale = self.param(NORM_SCALE, nn.with_partitioning(start, (self.axis,)), x.shape[-1:])
    if c.unit_offset_norms:
      scale = 1 + scale
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    normed = x * jax.lax.rsqrt(mean_square + c.norm_eps)
    # Spread in one step: of a scale [1, 1, D] for one row the gradient would be a sum along T that
    # keeps an axis, for which XLA's loop on a CPU takes ten times as long.
    return (normed * jnp.broadcast_to(scale, x.shape)).astype(c.dtype)


def fan_in_init(*fan_in_axes: int) -> nn.initializers.Initializer:
  """Truncated normal with variance 1 / fan-in, the fan-in being the product of the given axes."""

  def init(key, shape, dtype=jnp.float32):
    fan_in = 1
    for axis in fan_in_axes:
      fan_in *= shape[axis]
    return nn.initializers.truncated_normal(fan_in**-0.5)(key, shape, dtype)

  return init


def rescale(product: jax.Array, scales: jax.Array | None) -> jax.Array:
  """A product with a weight, times the scales of its channels if the weight is quantised."""
  if scales is None:
    return product
  before = tuple(range(product.ndim - scales.ndim))
  return (product * jnp.expand_dims(scales, before)).astype(product.dtype)


class Block(nn.Module):
  """Attention and a gated feed-forward layer, each with a norm before it and a residual."""

  cfg: DecoderConfig
  attend: Attend
  kind: LayerKind

  def _weight(self, name, shape, axes, fan_in_axes=(0,)):
    init = nn.with_partitioning(fan_in_init(*fan_in_axes), axes)
    weight = self.param(name, init, shape).astype(self.cfg.dtype)
    return gather_weight(self.cfg.gather, weight, axes)

  def _rescale(self, name, product):
    return rescale(product, self.get_variable("params", name + SCALES))

  def _add_bias(self, name, product, axes):
    init = nn.with_partitioning(nn.initializers.zeros, axes)
    bias = self.param(name + "_bias", init, product.shape[2:]).astype(self.cfg.dtype)
    return product + jnp.broadcast_to(gather_weight(self.cfg.gather, bias, axes), product.shape)

  @nn.compact
  def __call__(self, x_BxTxD, positions_BxT, tables, context, cache, read_BxR=None):
    c = self.cfg
    h_BxTxD = RMSNorm(c, name="attention_norm")(x_BxTxD)
    q_shape, k_shape = (c.heads, c.head_dim), (c.kv_heads, c.head_dim)
    wq = self._weight("query", (c.width, *q_shape), ("width", "heads", None))
    wk = self._weight("key", (c.width, *k_shape), ("width", "kv_heads", None))
    wv = self._weight("value", (c.width, *k_shape), ("width", "kv_heads", None))
    wo = self._weight("out", (*q_shape, c.width), ("heads", None, "width"), (0, 1))
    q_BxTxHxDh = self._rescale("query", product(h_BxTxD, wq))
    k_BxTxKxDh = self._rescale("key", product(h_BxTxD, wk))
    v_BxTxKxDh = self._rescale("value", product(h_BxTxD, wv))
    if c.qkv_bias:
      q_BxTxHxDh = self._add_bias("query", q_BxTxHxDh, ("heads", None))
      k_BxTxKxDh = self._add_bias("key", k_BxTxKxDh, ("kv_heads", None))
      v_BxTxKxDh = self._add_bias("value", v_BxTxKxDh, ("kv_heads", None))
    if c.qk_norm:
      q_BxTxHxDh = RMSNorm(c, axis=None, name="query_norm")(q_BxTxHxDh)
      k_BxTxKxDh = RMSNorm(c, axis=None, name="key_norm")(k_BxTxKxDh)
    q_BxTxHxDh, k_BxTxKxDh = rotate(q_BxTxHxDh, tables), rotate(k_BxTxKxDh, tables)
    mixed_BxTxHxDh, cache = self.attend(
      q_BxTxHxDh,
      k_BxTxKxDh,
      v_BxTxKxDh,
      positions_BxT,
      context,
      cache,
      c.attention_spec(self.kind),
    )
    if read_BxR is not None:  # from here on T is R
      x_BxTxD, mixed_BxTxHxDh = pick(x_BxTxD, read_BxR), pick(mixed_BxTxHxDh, read_BxR)
    out_BxTxD = self._rescale("out", product(mixed_BxTxHxDh, wo))
    if c.post_norms:
      out_BxTxD = RMSNorm(c, name="attention_post_norm")(out_BxTxD)
    x_BxTxD = x_BxTxD + out_BxTxD

    h_BxTxD = gather_rows(c.spread, RMSNorm(c, name="mlp_norm")(x_BxTxD))
    gate = self._weight("gate", (c.width, c.ffn), ("width", "ffn"))
    up = self._weight("up", (c.width, c.ffn), ("width", "ffn"))
    down = self._weight("down", (c.ffn, c.width), ("ffn", "width"))
    gate_BxTxF = self._rescale("gate", product(h_BxTxD, gate))
    f_BxTxF = ACTIVATIONS[c.activation](gate_BxTxF) * self._rescale("up", product(h_BxTxD, up))
    out_BxTxD = split_rows(c.spread, self._rescale("down", product(f_BxTxF, down)))
    if c.post_norms:
      out_BxTxD = RMSNorm(c, name="mlp_post_norm")(out_BxTxD)
    return x_BxTxD + out_BxTxD, cache


class Decoder(nn.Module):
  """Tokens to final hidden states; logits are the caller's (`token_logits`, `token_logprobs`)."""

  cfg: DecoderConfig
  attend: Attend

  @nn.compact
  def __call__(
    self, tokens_BxT, positions_BxT, context, caches, read_BxR=None, *, longest: int | None = None
  ):
    """Runs the blocks, the last of them as far as its states are read.

    Args:
      tokens_BxT: [B, T] int32.
      positions_BxT: [B, T] int32, distance from the root of the token's tree.
      context: what `attend` needs and all layers share, a pytree of arrays.
      caches: one pytree a layer, or None for every layer.
      read_BxR: [B, R] int32, row indices of the states that are wanted; None: all T in order. If
        they are fewer than T, the others are keys and values of the last layer alone, and cost no
        feed-forward there.
      longest: all positions are below it; None: below T.

    Returns:
      (hidden states after the last norm [B, R, D], tuple of the layers' new caches).
    """
    c = self.cfg
    init = nn.with_partitioning(nn.initializers.truncated_normal(c.width**-0.5), _EMBEDDING_AXES)
    embedding_VxD = self.param("embedding", init, (c.vocab_size, c.width)).astype(c.dtype)
    if not c.tie_embeddings:
      init = nn.with_partitioning(fan_in_init(0), _EMBEDDING_AXES[::-1])
      self.param("unembedding", init, (c.width, c.vocab_size))
    x_BxTxD = gather_weight(c.gather, embedding_VxD, _EMBEDDING_AXES)[tokens_BxT]
    if c.embedding_scale != 1:
      x_BxTxD = x_BxTxD * c.embedding_scale
    ropes = dict.fromkeys(kind.rope for kind in c.layer_kinds)  # a set has no fixed order
    longest = longest or tokens_BxT.shape[1]
    tables = {
      rope: take_tables(rotary_tables(rope, longest, c.head_dim), positions_BxT) for rope in ropes
    }
    few = read_BxR is not None and read_BxR.shape[1] < tokens_BxT.shape[1]
    block = REMATS[c.remat](Block)
    new_caches = []
    if c.scan_layers and caches is None and not self.is_initializing():
      x_BxTxD, new_caches = self._scan(x_BxTxD, positions_BxT, tables, context, c.layers - few)
    for layer in range(len(new_caches), c.layers):
      cache = None if caches is None else caches[layer]
      kind = c.layer_kind(layer)
      read = read_BxR if few and layer == c.layers - 1 else None
      x_BxTxD, cache = block(c, self.attend, kind, name=block_name(layer))(
        x_BxTxD, positions_BxT, tables[kind.rope], context, cache, read
      )
      new_caches.append(cache)
    x_BxTxD = RMSNorm(c, name="final_norm")(x_BxTxD)
    if read_BxR is not None and not few:
      x_BxTxD = pick(x_BxTxD, read_BxR)
    return x_BxTxD, tuple(new_caches)

  def _scan(self, x_BxTxD, positions_BxT, tables, context, most: int):
    """Runs the first layers, at most so many, as one loop over their stacked weights.

    A turn is a layer of each kind: a compiler then sees as many layers as there are kinds.

    Returns:
      (states, list of the caches of the layers that have run).
    """
    c = self.cfg
    kinds = _period(c.layer_kinds)
    turns = most // len(kinds)
    if turns < 2:
      return x_BxTxD, []
    weights = cast_weights(c, self.variables["params"])
    stack = lambda *leaves: jnp.stack(leaves)
    stacked = [
      jax.tree.map(stack, *(weights[block_name(turn * len(kinds) + i)] for turn in range(turns)))
      for i in range(len(kinds))
    ]

    blocks = [REMATS[c.remat](Block)(c, self.attend, kind, parent=None) for kind in kinds]

    def turn(x_BxTxD, weights):
      caches = []
      for block, of_block, kind in zip(blocks, weights, kinds, strict=True):
        inputs = (x_BxTxD, positions_BxT, tables[kind.rope], context, None)
        x_BxTxD, cache = block.apply({"params": of_block}, *inputs)
        caches.append(cache)
      return x_BxTxD, caches

    x_BxTxD, caches = jax.lax.scan(turn, x_BxTxD, stacked)
    of_turn = lambda i: [jax.tree.map(lambda x: x[i], cache) for cache in caches]
    return x_BxTxD, [cache for i in range(turns) for cache in of_turn(i)]


def _period(kinds: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
  """The shortest beginning that all of it repeats."""
  repeats = lambda size: all(kind == kinds[i % size] for i, kind in enumerate(kinds))
  return kinds[: next(size for size in range(1, len(kinds) + 1) if repeats(size))]


def block_name(layer: int) -> str:
  """Name of a layer's parameters."""
  return f"block_{layer}"


def weights_per_token(cfg: DecoderConfig, params) -> int:
  """Parameters of the blocks and of the unembedding, with which every token is multiplied."""
  blocks = [params[block_name(layer)] for layer in range(cfg.layers)]
  return sum(x.size for x in jax.tree.leaves(blocks)) + cfg.width * cfg.vocab_size


def forward(
  cfg,
  attend,
  params,
  tokens_BxT,
  positions_BxT,
  context=None,
  caches=None,
  read_BxR=None,
  *,
  longest=None,
):
  """Applies the decoder with the given attention: see `Decoder.__call__`."""
  return Decoder(cfg, attend).apply(
    {"params": params}, tokens_BxT, positions_BxT, context, caches, read_BxR, longest=longest
  )


def cast_weights(cfg: DecoderConfig, params):
  """Parameters whose weights are in the dtype of the activations, for a loop that multiplies them
  again and again. The scales of norms, which work in float32, stay as they are."""

  def cast(path, leaf):
    return leaf if path[-1].key == NORM_SCALE else leaf.astype(cfg.dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def unembedding(cfg: DecoderConfig, params) -> jax.Array:
  """The [D, V] matrix that turns hidden states into logits, in the dtype of the activations."""
  matrix_DxV = params["unembedding"] if "unembedding" in params else params["embedding"].T
  return gather_weight(cfg.gather, matrix_DxV.astype(cfg.dtype), _EMBEDDING_AXES[::-1])


def token_logits(cfg: DecoderConfig, params, hidden: jax.Array) -> jax.Array:
  """Logits [..., V] float32 of what follows, from hidden states [..., D]."""
  hidden = gather_rows(cfg.spread, hidden)
  logits = jnp.dot(hidden, unembedding(cfg, params), preferred_element_type=jnp.float32)
  logits = split_rows(cfg.spread, split_channels(cfg.spread, logits))
  return soft_cap(rescale(logits, params.get("unembedding" + SCALES)), cfg.logit_cap)


def init_params(cfg: DecoderConfig, key: jax.Array):
  """Random float32 parameters, each boxed with its logical axis names (`nn.Partitioned`)."""
  attend = lambda q, k, v, positions, context, cache, spec: (q, cache)
  tokens = jnp.zeros((1, 1), jnp.int32)
  return Decoder(cfg, attend).init(key, tokens, tokens, None, None)["params"]


def count_params(params) -> int:
  """Number of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
