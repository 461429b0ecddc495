import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models.attention import (
  AttentionSpec,
  DecodeContext,
  LayerCache,
  attend_decode,
  blocks,
  decode,
  flash,
  pallas_decode,
)
from spo_jax.training.key_blocks import visible_blocks

T, H, K, DH = 24, 4, 2, 8
PLAIN = AttentionSpec(DH**-0.5)
CAPPED_WINDOW = AttentionSpec(0.7, window=3, cap=1.5)
# Of float32 gradients of size 2: each kind of processor adds in an order of its own, and two
# backends were up to 8e-6 apart on one.
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}


def random_row(rng, length):
  """A row of random trees, depth first, and padding: (prev, until), both [length]."""
  prev, until = [], {}

  def grow(above):
    start = len(prev)
    for _ in range(rng.integers(1, 5)):
      if len(prev) < length - 2:
        prev.append(above)
        above = len(prev) - 1
    end = len(prev)
    for _ in range(rng.integers(0, 4) if end > start else 0):
      grow(above)
    until.update(dict.fromkeys(range(start, end), len(prev)))

  while len(prev) < length - 2:
    grow(-1)
  until.update({i: i + 1 for i in range(len(prev), length)})
  prev += [-1] * (length - len(prev))
  return prev, [until[i] for i in range(length)]


def ancestors(prev):
  """[T, T] bool: key j is query i, or what it continues, however far back."""
  visible = np.eye(len(prev), dtype=bool)
  for i, above in enumerate(prev):
    if above >= 0:
      visible[i] |= visible[above]
  return visible


def dense_attention(q, k, v, visible, scale=DH**-0.5, cap=None):
  """Softmax attention [T, H, Dh] under a mask [T, S]; head h reads key-value head h * K // H."""
  repeat = q.shape[1] // k.shape[1]
  k, v = (jnp.repeat(x, repeat, axis=1) for x in (k, v))
  scores = jnp.einsum("thd,shd->hts", q, k) * scale
  if cap is not None:
    scores = cap * jnp.tanh(scores / cap)
  weights = jax.nn.softmax(jnp.where(visible[None], scores, -jnp.inf), axis=-1)
  return jnp.einsum("hts,shd->thd", weights, v)


@pytest.fixture(scope="module")
def forests():
  """(prev, until), [3, T] each."""
  rng = np.random.default_rng(0)
  prev, until = zip(*[random_row(rng, T) for _ in range(3)], strict=True)
  return np.array(prev), np.array(until, np.int32)


@pytest.fixture(scope="module")
def qkv():
  rng = np.random.default_rng(1)
  return tuple(rng.normal(size=(3, T, heads, DH)).astype(np.float32) for heads in (H, K, K))


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(attention, qkv, *args):
  """The output, and gradients of a function of all of it."""
  loss = lambda qkv: jnp.sum(jnp.sin(3 * attention(*qkv, *args)))
  return attention(*qkv, *args), jax.grad(loss)(qkv)


def test_forests_branch_and_have_padding(forests):
  prev, until = forests
  children = [np.bincount(row[row >= 0]).max() for row in prev]
  assert max(children) > 1 and (prev[:, 1:] == -1).any()
  assert (until[:, -1] == T).all() and (until > np.arange(T)).all()


def in_blocks(until, queries, keys, width):
  """What `interval_attention` takes besides q, k, v and positions."""
  return until.reshape(len(until), -1, keys), visible_blocks(until, queries, keys, width)


def depths(prev):
  """[T] int32: steps from the root of each token's tree."""
  return (ancestors(prev).sum(-1) - 1).astype(np.int32)


def backends(spec):
  """The two implementations of interval attention."""
  return [functools.partial(backend.interval_attention, spec=spec) for backend in (blocks, flash)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  """Of one key block, two, or all, so that the loop over them runs more than once."""
  monkeypatch.setattr(flash, "SCORES", 100)


dense_capped = functools.partial(dense_attention, scale=CAPPED_WINDOW.scale, cap=CAPPED_WINDOW.cap)


@pytest.mark.parametrize("attention", backends(PLAIN), ids=["blocks", "flash"])
@pytest.mark.parametrize(
  "queries, keys, width", [(24, 24, 0), (8, 8, 0), (12, 4, 0), (24, 3, 0), (3, 3, 8)]
)
def test_interval_attention_is_attention_to_ancestors(
  forests, qkv, attention, queries, keys, width
):
  prev, until = forests
  visible = np.stack([ancestors(row) for row in prev])
  listed = in_blocks(until, queries, keys, width)
  got = value_and_grads(attention, qkv, np.zeros((3, T), np.int32), *listed)
  want = value_and_grads(jax.vmap(dense_attention), qkv, visible)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), got, want)


@pytest.mark.parametrize("attention", backends(CAPPED_WINDOW), ids=["blocks", "flash"])
def test_a_window_counts_ancestors_not_row_indices(forests, qkv, attention):
  prev, until = forests
  positions = np.stack([depths(row) for row in prev])
  visible = np.stack([ancestors(row) for row in prev])
  near = visible & (positions[:, :, None] - positions[:, None] < CAPPED_WINDOW.window)
  index = np.arange(T)
  by_index = visible & (index[:, None] - index < CAPPED_WINDOW.window)
  assert (near != visible).any() and (near != by_index).any()
  got = value_and_grads(attention, qkv, positions, *in_blocks(until, 12, 4, 0))
  want = value_and_grads(jax.vmap(dense_capped), qkv, near)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **ROUNDING), got, want)


@pytest.mark.parametrize("attention", backends(PLAIN), ids=["blocks", "flash"])
def test_fully_masked_queries_are_finite(qkv, attention):
  """A row of nothing but padding, whose keys are visible to nobody."""
  until = np.zeros((3, T), np.int32)
  until[1:] = T
  listed = np.full((3, 3, 3), -1, np.int32)
  listed[1:] = visible_blocks(until[1:], 8, 8, 3)
  positions = np.zeros((3, T), np.int32)
  result = value_and_grads(attention, qkv, positions, until.reshape(3, 3, 8), listed)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))


def test_a_query_of_the_kernel_that_sees_all_slots_sees_no_others(monkeypatch):
  """7 slots in blocks of 4: the last block reaches beyond the array."""
  monkeypatch.setattr(pallas_decode, "MOST_SLOTS", 4)
  rng = np.random.default_rng(0)
  q, k, v = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((2, 1, 3, 8), (2, 1, 8, 7), (2, 1, 7, 8))
  )
  all_int32 = np.iinfo(np.int32)
  bounds = np.broadcast_to(np.array([all_int32.min, all_int32.max], np.int32), (2, 3, 2))
  mixed, log_sum = pallas_decode.partial_attention(
    q, k, v, np.zeros((1, 7), np.int32), bounds, PLAIN, interpret=True
  )
  scores = PLAIN.scale * q @ k
  np.testing.assert_allclose(log_sum, jax.nn.logsumexp(scores, axis=-1), rtol=1e-5)
  np.testing.assert_allclose(mixed, jax.nn.softmax(scores, axis=-1) @ v, rtol=1e-5, atol=1e-6)


def test_a_tpu_keeps_caches_in_its_memory():
  """The kernel's keys and values, after the number of blocks and the queries, are told to lie
  there; by itself the compiler moves whole caches into the core and back in each step."""
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  number, whole = functools.partial(array, jnp.bfloat16), functools.partial(array, jnp.int32)
  attend = jax.jit(functools.partial(pallas_decode.partial_attention, spec=PLAIN))
  traced = attend.trace(
    *(number(2, 2, 6, 128), number(2, 2, 128, 256), number(2, 2, 256, 128)),
    *(whole(2, 256), whole(2, 6, 2)),
  )
  text = traced.lower(lowering_platforms=("tpu",)).as_text().replace("\\22", '"')
  (colors,) = re.findall(r'memory_space_colors": (\[.*?\])', text)
  in_memory = {one["operand_index"] for one in json.loads(colors) if one["color"] == 0}
  assert in_memory == {2, 3}


@pytest.mark.parametrize("backend", ["blocks", "pallas"])
@pytest.mark.parametrize("spec", [PLAIN, CAPPED_WINDOW], ids=["plain", "capped window"])
@pytest.mark.parametrize("sizes", [(6,), (4, 2)], ids=["ring", "chunks"])
def test_attend_decode_is_dense_attention_over_prefix_and_suffix(monkeypatch, backend, spec, sizes):
  """The prefix's slots lie in any order, some empty; a ring is in every rotation.

  A group that does not write keeps its suffix. The kernel works in blocks of 4 slots.
  """
  interpreted = functools.partial(pallas_decode.partial_attention, interpret=True)
  monkeypatch.setattr(decode, "partial_attention", interpreted)
  monkeypatch.setattr(pallas_decode, "MOST_SLOTS", 4)
  spec = dataclasses.replace(spec, backend=backend)
  rng = np.random.default_rng(2)
  R, n, P, S = 4, 3, 7, sum(sizes)
  B = R * n
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q, k, v = draw(B, 1, H, DH), draw(B, 1, K, DH), draw(B, 1, K, DH)
  prefix = draw(R, K, DH, P), draw(R, K, P, DH)
  suffix = draw(B, K, DH, S), draw(B, K, S, DH)
  order = rng.permuted(np.tile(np.arange(P), (R, 1)), axis=1)
  prefix_positions = np.where(order < 5, order, np.iinfo(np.int32).max).astype(np.int32)
  visible = rng.integers(0, 6, (R, n)).astype(np.int32)
  visible[0, 0] = 0
  writes = np.array([True, True, True, False]) if len(sizes) == 1 else None
  step = jax.jit(attend_decode, static_argnames="spec")
  dense = jax.jit(jax.vmap(functools.partial(dense_attention, scale=spec.scale, cap=spec.cap)))
  edges = np.cumsum((0, *sizes))
  for slot in range(S) if len(sizes) == 1 else range(edges[-2], S):
    age_S = ((slot - np.arange(S)) % S).astype(np.int32)
    steps = np.arange(R, dtype=np.int32) + (edges[-2] if len(sizes) > 1 else 0)
    spans = [slice(*edges[i : i + 2]) for i in range(len(sizes))]
    *full, last = [(suffix[0][..., span], suffix[1][:, :, span]) for span in spans]
    context = DecodeContext(
      visible,
      prefix_positions,
      tuple(age_S[span] for span in spans),
      steps,
      jnp.int32(slot - edges[-2]),
      writes,
    )
    positions = visible + steps[:, None]
    cache = LayerCache(prefix, tuple(full), last)
    mixed, last = step(q, k, v, positions.reshape(-1, 1), context, cache, spec=spec)

    want_k, want_v = (x.copy() for x in suffix)
    written = np.repeat(np.ones(R, bool) if writes is None else writes, n)
    want_k[written, :, :, slot] = k[written, 0]
    want_v[written, :, slot] = v[written, 0]
    np.testing.assert_array_equal(last[0], want_k[..., spans[-1]])
    np.testing.assert_array_equal(last[1], want_v[:, :, spans[-1]])
    by_token = lambda x, y: np.concatenate([np.repeat(x, n, axis=0), y], axis=1)
    keys = by_token(prefix[0].transpose(0, 3, 1, 2), want_k.transpose(0, 3, 1, 2))
    values = by_token(prefix[1].swapaxes(1, 2), want_v.swapaxes(1, 2))
    at_prefix = np.repeat(prefix_positions, n, axis=0).astype(np.int64)
    back = positions.reshape(-1, 1) - at_prefix
    sees_prefix = at_prefix < visible.reshape(-1, 1)
    sees_suffix = np.repeat(age_S <= steps[:, None], n, axis=0)
    mask = np.concatenate([sees_prefix, sees_suffix], axis=1)
    if spec.window is not None:
      distance = np.concatenate([back, np.broadcast_to(age_S, (B, S))], axis=1)
      mask &= distance < spec.window
    want = dense(q, keys, values, mask[:, None])
    np.testing.assert_allclose(mixed, want, rtol=1e-5, atol=2e-6)
