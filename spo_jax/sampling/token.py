"""Drawing one token: the only place where a distribution becomes a sample.

Nothing is sorted and no cumulative sum runs over the vocabulary: what a draw costs is a few passes
over the logits. Axis letters: B rows, V vocabulary, J blocks of L tokens.
"""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

LEAST_LANES, MOST_LANES = 32, 256  # bounds of L


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How tokens are drawn; hashable, a static argument of jitted functions."""

  temperature: float = 1.0  # 0 is greedy
  top_k: int = 0  # 0 keeps all
  top_p: float = 1.0  # 1 keeps all

  @property
  def truncates(self) -> bool:
    """Whether some tokens may be left out."""
    return self.top_k > 0 or self.top_p < 1


def sample_token(
  keys_B: jax.Array, logits_BxV: jax.Array, sampling: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
  """Draws a token a row by inverting the CDF at two uniform numbers, not by V Gumbel numbers.

  Args:
    keys_B: [B] typed PRNG keys; a row's draw depends on its own key alone.
    logits_BxV: [B, V].
    sampling: temperature, top-k and top-p, applied in this order. Truncation keeps the `top_k`
      likeliest tokens, and of these the fewest that reach `top_p` of their mass, at least one; of
      equally likely tokens the smaller id comes first.

  Returns:
    (tokens [B] int32, log-probs [B] float32). The log-prob is under softmax(logits / temperature),
    before truncation by top-k and top-p: that is the distribution that the loss uses. At
    temperature 0 it is under softmax(logits).
  """
  chex.assert_rank([keys_B, logits_BxV], [1, 2])
  blocks = _Blocks.of(logits_BxV.astype(jnp.float32), sampling.temperature or 1.0)
  # What follows reads the masses of the blocks, not those of the tokens again.
  mass_BxJ = jax.lax.optimization_barrier(blocks.mass())
  whole_B = mass_BxJ.sum(-1)
  if sampling.temperature == 0:
    drawn = blocks.likeliest()
  elif sampling.truncates:
    drawn = _draw_truncated(keys_B, blocks, mass_BxJ, sampling)
  else:
    drawn = blocks.draw(keys_B, mass_BxJ)
  return drawn.token_B, drawn.scaled_B - blocks.peak_B - jnp.log(whole_B)


class _Token(NamedTuple):
  """A token a row."""

  token_B: jax.Array  # int32
  scaled_B: jax.Array  # float32, its logit over the temperature

  def comes_after(self, scaled: jax.Array, ids: jax.Array) -> jax.Array:
    """[B, ...] whether it does, in the order of truncation, after each of these tokens: they are
    likelier, or as likely and smaller."""
    widen = lambda x: x.reshape(-1, *[1] * (scaled.ndim - 1))
    limit = widen(self.scaled_B)
    return (scaled > limit) | ((scaled == limit) & (ids < widen(self.token_B)))


class _Blocks(NamedTuple):
  """Rows of logits in J blocks of L: the inverse of a CDF finds a block, then a token in it.

  The logits are as they came, and whoever reads them divides by the temperature: else the quotients
  would be written, of all tokens, to be read again.
  """

  logits_BxJxL: jax.Array  # float32, -inf behind the vocabulary
  temperature: float
  peak_B: jax.Array  # the largest of a row, over the temperature

  @classmethod
  def of(cls, logits_BxV: jax.Array, temperature: float) -> "_Blocks":
    B, V = logits_BxV.shape
    # A width that divides the vocabulary spares a copy of the logits with padding.
    exact = (width for width in range(MOST_LANES, LEAST_LANES - 1, -1) if V % width == 0)
    L = min(V, next(exact, MOST_LANES))
    padded = jnp.pad(logits_BxV, ((0, 0), (0, -V % L)), constant_values=-jnp.inf)
    return cls(padded.reshape(B, -1, L), temperature, logits_BxV.max(-1) / temperature)

  def scaled(self) -> jax.Array:
    """[B, J, L] logits over the temperature."""
    return self.logits_BxJxL / self.temperature

  def ids(self) -> jax.Array:
    """[1, J, L] int32."""
    _, J, L = self.logits_BxJxL.shape
    return jnp.arange(J * L, dtype=jnp.int32).reshape(1, J, L)

  def mass(self, kept: jax.Array | bool = True) -> jax.Array:
    """[B, J] unnormalised mass of the kept tokens."""
    mass = jnp.exp(self.scaled() - self.peak_B[:, None, None])
    return jnp.where(kept, mass, 0).sum(-1)

  def block(self, block_B: jax.Array) -> jax.Array:
    """[B, L] logits of one block a row, over the temperature."""
    block = jnp.take_along_axis(self.logits_BxJxL, block_B[:, None, None], axis=1)[:, 0]
    return block / self.temperature

  def draw(self, keys_B: jax.Array, mass_BxJ: jax.Array, before: _Token | None = None) -> _Token:
    """Draws from the tokens before one in the order of truncation; these are the masses of their
    blocks."""
    uniform_Bx2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block_B = _invert(mass_BxJ, uniform_Bx2[:, 0])
    scaled_BxL = self.block(block_B)
    mass_BxL = jnp.exp(scaled_BxL - self.peak_B[:, None])
    if before is not None:
      L = scaled_BxL.shape[-1]
      ids_BxL = block_B[:, None] * L + jnp.arange(L)[None]
      mass_BxL = jnp.where(before.comes_after(scaled_BxL, ids_BxL), mass_BxL, 0)
    return _in_block(block_B, scaled_BxL, _invert(mass_BxL, uniform_Bx2[:, 1]))

  def likeliest(self) -> _Token:
    """The first of the likeliest tokens."""
    block_B = jnp.argmax(self.logits_BxJxL.max(-1), axis=-1).astype(jnp.int32)
    scaled_BxL = self.block(block_B)
    return _in_block(block_B, scaled_BxL, jnp.argmax(scaled_BxL, axis=-1).astype(jnp.int32))


def _in_block(block_B: jax.Array, scaled_BxL: jax.Array, inside_B: jax.Array) -> _Token:
  """The tokens at these places of blocks."""
  scaled_B = jnp.take_along_axis(scaled_BxL, inside_B[:, None], axis=-1)[:, 0]
  return _Token(block_B * scaled_BxL.shape[-1] + inside_B, scaled_B)


def _invert(mass_BxN: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """[B] int32: the first of N whose cumulative mass exceeds a uniform share of the whole.

  What has no mass is never chosen: the sum is rounded, so not quite flat there.
  """
  cdf_BxN = jnp.where(mass_BxN > 0, jnp.cumsum(mass_BxN, axis=-1), 0)
  above_BxN = cdf_BxN > uniform_B[:, None] * cdf_BxN.max(-1, keepdims=True)
  return jnp.argmax(above_BxN, axis=-1).astype(jnp.int32)


def _draw_truncated(
  keys_B: jax.Array, blocks: _Blocks, mass_BxJ: jax.Array, sampling: SamplingConfig
) -> _Token:
  """Draws from the truncated distribution, by rejection.

  Tokens stand in order of their mass. One is drawn from all; if it is kept by the truncation, that
  is the draw. If not, neither is any behind it: the next is drawn from those before it. Each try
  leaves out half of the surplus in the mean, so a few passes over the logits do what sorting would.
  """
  whole_B = mass_BxJ.sum(-1)
  if sampling.top_k:
    flat_BxV = blocks.logits_BxJxL.reshape(len(keys_B), -1)
    ranked = jax.lax.top_k(flat_BxV, min(sampling.top_k, flat_BxV.shape[-1]))[0]
    whole_B = jnp.exp(ranked / blocks.temperature - blocks.peak_B[:, None]).sum(-1)

  class Try(NamedTuple):
    drawn: _Token  # those before it are left
    mass_BxJ: jax.Array  # of them
    accepted_B: jax.Array
    count: jax.Array

  def attempt(last: Try) -> Try:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, last.count)
    drawn = jax.tree.map(
      lambda old, new: jnp.where(last.accepted_B, old, new),
      last.drawn,
      blocks.draw(keys, last.mass_BxJ, last.drawn),
    )
    before_BxJxL = drawn.comes_after(blocks.scaled(), blocks.ids())
    before_BxJ = blocks.mass(before_BxJxL)
    # Not `<`: a row of NaN, as continuations that are done may have, must not go on forever.
    accepted_B = ~(before_BxJ.sum(-1) >= sampling.top_p * whole_B)
    if sampling.top_k:
      accepted_B &= before_BxJxL.sum((-2, -1)) < sampling.top_k
    return Try(drawn, before_BxJ, accepted_B, last.count + 1)

  rows = jnp.zeros_like(whole_B)
  last_of_all = _Token(rows.astype(jnp.int32), rows - jnp.inf)
  start = Try(last_of_all, mass_BxJ, rows > 0, jnp.zeros((), jnp.int32))
  return jax.lax.while_loop(lambda tried: ~tried.accepted_B.all(), attempt, start).drawn
