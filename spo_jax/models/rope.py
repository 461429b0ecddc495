"""Rotary position embedding with the scalings that published checkpoints use.

Frequencies are computed by NumPy with the roundings to float32 of `transformers`
(`modeling_rope_utils.py`): at position 8000 a frequency that is rounded otherwise is an angle that
is wrong by up to 5e-4.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
  """How far a pair of channels turns from one position to the next; hashable.

  Kinds: "exact" (theta ** (-2i / Dh), rounded once), "default" (the same, rounded as `transformers`
  does), "linear" (positions divided by `factor`), "llama3" (Llama 3.1: long wavelengths divided by
  `factor`) and "yarn" (https://arxiv.org/abs/2309.00071).
  """

  theta: float  # base of the frequencies
  kind: str = "default"
  factor: float = 1.0  # by which the context was stretched; exact, default: has none
  original_length: int = 0  # llama3, yarn: tokens of context before the stretch
  low_freq_factor: float = 1.0  # llama3: wavelengths above original_length / this are divided
  high_freq_factor: float = 1.0  # llama3: those below original_length / this are left as they are
  beta_fast: float = 32.0  # yarn: turns within original_length from which a frequency is kept
  beta_slow: float = 1.0  # yarn: turns up to which it is divided by `factor`
  truncate: bool = True  # yarn: whether the bounds of the ramp between them are whole channels
  attention_factor: float = 1.0  # yarn: cosines and sines are multiplied by it


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """[Dh / 2] float32, radians a position.

  Raises:
    ValueError: if the kind is unknown.
  """
  if rope.kind == "exact":
    return (rope.theta ** (-np.arange(head_dim // 2) / (head_dim // 2))).astype(np.float32)
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  wave = (np.float64(rope.theta) ** exponent.astype(np.float64)).astype(np.float32)
  kept = np.float32(1) / wave
  if rope.kind == "default":
    return kept
  if rope.kind == "linear":
    return kept / np.float32(rope.factor)
  if rope.kind == "llama3":
    return _llama3(rope, kept)
  if rope.kind == "yarn":
    divided = np.float32(1) / (np.float32(rope.factor) * wave)
    kept_share = 1 - _yarn_ramp(rope, head_dim)
    return divided * (1 - kept_share) + kept * kept_share
  raise ValueError(
    f"unknown kind of RoPE {rope.kind!r}, one of exact, default, linear, llama3, yarn"
  )


def _llama3(rope: Rope, kept: np.ndarray) -> np.ndarray:
  low, high = rope.low_freq_factor, rope.high_freq_factor
  wavelength = 2 * math.pi / kept
  smooth = (rope.original_length / wavelength - low) / (high - low)
  blend = (1 - smooth) * kept / rope.factor + smooth * kept
  long, short = wavelength > rope.original_length / low, wavelength < rope.original_length / high
  return np.where(long, kept / rope.factor, np.where(short, kept, blend))


def _yarn_ramp(rope: Rope, head_dim: int) -> np.ndarray:
  """[Dh / 2] float32: 0 where a frequency is kept, 1 where it is divided by the factor."""

  def channel(turns: float) -> float:
    """The (fractional) pair of channels that turns so many times within the original length."""
    wavelength = rope.original_length / turns
    return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

  low, high = channel(rope.beta_fast), channel(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  if low == high:
    high += 0.001  # as in `transformers`: a step in place of a division by zero
  pair = np.arange(head_dim // 2, dtype=np.float32)
  return np.clip((pair - np.float32(low)) / np.float32(high - low), 0, 1)


@functools.lru_cache
def rotary_tables(rope: Rope, longest: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines of the angles at positions 0, 1, ..., [longest, Dh / 2] float32 each.

  They are constants of a compiled program: a cosine in it would be computed for every head and
  layer again, and cost more on a CPU than the attention of a short row.
  """
  positions_Tx1 = np.arange(longest, dtype=np.float32)[:, None]
  angles_TxC = positions_Tx1 * frequencies(rope, head_dim)[None]
  factor = np.float32(rope.attention_factor)
  return np.cos(angles_TxC) * factor, np.sin(angles_TxC) * factor


def take_tables(
  tables: tuple[np.ndarray, np.ndarray], positions_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """[B, T, 1, Dh / 2] each: the rows of tables at positions; NaN beyond their last."""
  take = lambda table: jnp.asarray(table).at[positions_BxT].get(mode="fill", fill_value=jnp.nan)
  return tuple(take(table)[:, :, None] for table in tables)


def rotate(x_BxTxHxDh: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns channel i of the first half of the head dimension with channel i of the second.

  Args:
    x_BxTxHxDh: [B, T, H, Dh], any float dtype; the turn is done in float32.
    tables: from `take_tables`.

  Returns:
    Like x.
  """
  cos, sin = tables
  a, b = jnp.split(x_BxTxHxDh.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxHxDh.dtype)
