"""Attention of a chunk of a prompt to the cache of what is before it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models.attention import AttentionSpec, attend_chunk, chunks
from tests.models.test_attention import dense_attention
from tests.models.test_attention_backends import random_qkv

T, B, DH, C = 23, 2, 8, 7
KEYS = 4  # of a block


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(chunks, "KEY_BLOCK", KEYS)


@functools.partial(jax.jit, static_argnames="spec")
def attend(q, k, v, start, cache, spec):
  """The chunk at `start` of [B, T, ..] arrays."""
  take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, C, axis=1)
  positions = jnp.broadcast_to(start + jnp.arange(C), (B, C))
  return attend_chunk(take(q), take(k), take(v), positions, start, cache, spec)


@pytest.mark.parametrize(
  ("window", "cap"), [(None, None), (None, 1.5), (1, None), (KEYS + 1, 1.5), (2 * C, None)]
)
def test_chunks_attend_to_what_is_before_them_and_read_no_other_block(window, cap):
  """All slots that no query of the chunk's loop may read hold NaN."""
  spec = AttentionSpec(0.7, window, cap)
  q, k, v = random_qkv(B, T)
  index = np.arange(T)
  visible = index <= index[:, None]
  if window is not None:
    visible &= index[:, None] - index < window
  want = jax.vmap(lambda q, k, v: dense_attention(q, k, v, visible, spec.scale, cap))(q, k, v)
  stored = np.array(k.transpose(0, 2, 3, 1)), np.array(v.swapaxes(1, 2))
  # The last one overlaps with the one before it, and so does its last block of keys.
  for start in (0, C, 2 * C, T - C):
    first = 0 if window is None else max(start - window + 1, 0) // KEYS * KEYS
    read = (index >= first) & (index < -(-(start + C) // KEYS) * KEYS)
    if start + C == T:
      read[-KEYS:] = True
    cache = tuple(
      np.where(np.expand_dims(read, i), x, np.nan) for i, x in zip((0, 1), stored, strict=True)
    )
    mixed, (keys, values) = attend(q, k, v, start, cache, spec)
    np.testing.assert_allclose(mixed, want[:, start : start + C], rtol=1e-5, atol=2e-6)
    written = read | ((index >= start) & (index < start + C))
    np.testing.assert_array_equal(keys[..., written], stored[0][..., written])
    np.testing.assert_array_equal(values[:, :, written], stored[1][:, :, written])


def test_scores_of_bfloat16_inputs_are_float32():
  """Scores of size 30, which bfloat16 would round by up to 0.06, are exact to the last bits."""
  spec = AttentionSpec(4.0)
  q, k, v = random_qkv(B, T, dtype=jnp.bfloat16)
  found = {}
  for dtype in (jnp.bfloat16, jnp.float32):
    q_, k_, v_ = (x.astype(dtype) for x in (q, k, v))
    cache = k_.transpose(0, 2, 3, 1), v_.swapaxes(1, 2)
    found[dtype], _ = attend(q_, k_, v_, T - C, cache, spec)
  got, want = found.values()
  assert got.dtype == jnp.bfloat16
  assert np.abs(got.astype(jnp.float32) - want).max() < 0.012 * np.abs(want).max()
