"""Kernels for TPUs, run as ordinary operations: the numbers of other backends, on a mesh too."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.errors import UserError
from spo_jax.infra.mesh import ROWS, make_mesh
from spo_jax.models import attention
from spo_jax.models.attention import AttentionSpec, blocks, flash, pallas
from spo_jax.models.decoder import LayerKind, forward
from spo_jax.models.rope import Rope
from tests.models.test_attention import ROUNDING
from tests.models.test_attention_backends import SPEC, gradients, random_forests, random_qkv
from tests.tiny import VOCAB, tiny_config, tiny_params

interval_attention = functools.partial(pallas.interval_attention, interpret=True)
causal_attention = functools.partial(pallas.causal_attention, interpret=True)


def value_and_gradients(attend, qkv, listed, spec):
  """Of a function of all outputs, in one program: (outputs, gradients by q, k and v)."""

  def loss(qkv, *listed):
    mixed = attend(*qkv, *listed, spec)
    return jnp.sum(jnp.sin(3 * mixed.astype(jnp.float32))), mixed

  grads, mixed = jax.jit(jax.grad(loss, has_aux=True))(qkv, *listed)
  return mixed, *grads


def assert_same(got, want, **tolerance):
  for x, y in zip(got, want, strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize(
  ("keys", "spec"),
  [(4, SPEC), (8, AttentionSpec(0.7, window=3, cap=1.5))],
  ids=["plain", "window and cap"],
)
def test_numbers_are_those_of_the_other_backends(keys, spec):
  """Rows of random trees, in which key blocks that nobody sees are not listed.

  Padding of the list stands for the block before it, which is to count once.
  """
  positions, until, listed = random_forests(2, 32, 8, keys)
  assert not np.isin(np.arange(32 // keys), listed[0, -1]).all()
  wider = np.pad(listed, ((0, 0), (0, 0), (0, 3)), constant_values=-1)
  qkv = random_qkv(2, 32, H=6)
  got = value_and_gradients(interval_attention, qkv, (positions, until, wider), spec)
  want = value_and_gradients(blocks.interval_attention, qkv, (positions, until, listed), spec)
  assert_same(got, want, **ROUNDING)


def test_a_query_that_sees_nothing_gives_and_takes_nothing():
  """Of the first row keys are listed and seen by nobody; of the second the first half is not
  listed; of the third, nothing."""
  positions, until, listed = random_forests(3, 16, 8, 8)
  until[0] = 0
  listed = np.array([listed[0], [[-1, -1], [1, -1]], [[-1, -1], [-1, -1]]], np.int32)
  qkv = random_qkv(3, 16)
  got = value_and_gradients(interval_attention, qkv, (positions, until, listed), SPEC)
  want = value_and_gradients(flash.interval_attention, qkv, (positions, until, listed), SPEC)
  assert_same(got, want, **ROUNDING)
  for x in got:
    assert not x[0].any() and not x[1, :8].any() and x[1, 8:].any() and not x[2].any()


def test_sums_of_bfloat16_inputs_are_float32():
  """Scores of size 30, which bfloat16 would round by up to 0.06, are exact to the last bits."""
  spec, listed = AttentionSpec(4.0), random_forests(2, 24, 8, 4)
  halves = random_qkv(2, 24, dtype=jnp.bfloat16)
  singles = tuple(x.astype(jnp.float32) for x in halves)
  got = value_and_gradients(interval_attention, halves, listed, spec)
  want = value_and_gradients(blocks.interval_attention, singles, listed, spec)
  for x, y in zip(got, want, strict=True):
    assert x.dtype == jnp.bfloat16
    assert np.abs(x.astype(jnp.float32) - y).max() < 0.012 * np.abs(y).max()


@pytest.mark.parametrize(("T", "window"), [(7, None), (27, 9)])
def test_causal_attention_pads_rows_to_whole_blocks(monkeypatch, T, window):
  """Blocks of 8 keys."""
  monkeypatch.setattr(pallas, "CAUSAL_BLOCK", 8)
  spec = AttentionSpec(0.7, window)
  qkv = random_qkv(2, T)
  listed = (np.broadcast_to(np.arange(T, dtype=np.int32), (2, T)),)
  got = value_and_gradients(causal_attention, qkv, listed, spec)
  want = value_and_gradients(blocks.causal_attention, qkv, listed, spec)
  assert_same(got, want, **ROUNDING)


def test_blocks_of_a_causal_row_are_multiples_of_the_lanes(monkeypatch):
  asked = []
  monkeypatch.setattr(pallas, "causal_in_blocks", lambda *args: asked.append(args[-1]))
  for T in (1, 128, 129, 1000):
    qkv = random_qkv(1, T)
    pallas.causal_attention(*qkv, np.zeros((1, T), np.int32), SPEC)
  assert asked == [128, 128, 256, 256]


@pytest.mark.parametrize(
  ("axes", "rows", "heads", "part"),
  [
    ((2, 2, 2), 4, (4, 2), (1, 2, 1)),
    ((1, 2, 4), 2, (8, 2), (1, 2, 1)),  # two devices have the same keys and values
    ((4, 1, 2), 3, (3, 1), (3, 3, 1)),  # 3 rows on 4 devices, 3 heads on 2
  ],
  ids=["split", "repeated keys", "whole"],
)
def test_rows_and_heads_are_split_over_a_mesh(monkeypatch, axes, rows, heads, part):
  """`part`: the rows, query heads and key-value heads that one device computes."""
  mesh = make_mesh(*axes)
  parts, alone = set(), pallas.attention

  def note(spec, interpret, q, k, *rest):
    B, K, _, R, _ = q.shape
    parts.add((B, K * R // 8, K))
    return alone(spec, interpret, q, k, *rest)

  monkeypatch.setattr(pallas, "attention", note)
  qkv, listed = random_qkv(rows, 16, *heads), random_forests(rows, 16, 8, 4)
  spec = AttentionSpec(SPEC.scale, window=5, mesh=mesh)
  on_all = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
  got = value_and_gradients(interval_attention, *jax.tree.map(on_all, (qkv, listed)), spec)
  assert parts == {part}
  want = value_and_gradients(blocks.interval_attention, qkv, listed, spec)
  assert_same(got, want, **ROUNDING)


def test_what_is_split_already_is_not_gathered():
  """Rows and heads: the kernels of a device take what lies there."""
  mesh = make_mesh(2, 2, 2)
  spec = AttentionSpec(SPEC.scale, mesh=mesh)
  place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(ROWS, *axes)))
  qkv = tuple(place(x, None, "tensor") for x in random_qkv(4, 16))
  listed = tuple(place(x) for x in random_forests(4, 16, 8, 4))
  text = gradients(interval_attention, spec).lower(qkv, *listed).compile().as_text()
  collectives = r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("
  assert not re.findall(collectives, text)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "prefill"])
def test_a_decoder_on_a_mesh_computes_with_the_kernels(monkeypatch, packed):
  """Its attention knows the mesh; a window is that of the layer."""
  interpreted = tuple(functools.partial(f, interpret=True) for f in attention._FUNCTIONS["pallas"])
  monkeypatch.setitem(attention._FUNCTIONS, "pallas", interpreted)
  monkeypatch.setattr(pallas, "CAUSAL_BLOCK", 8)
  kinds = (LayerKind(Rope(1e4, "exact")), LayerKind(Rope(1e4, "exact"), window=4))
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 16)).astype(np.int32)
  positions, *listed = random_forests(2, 16, 8, 4)
  if not packed:
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
  attend = attention.attend_packed if packed else attention.attend_prefill
  hidden = {}
  for backend in ("blocks", "pallas"):
    cfg = tiny_config(layer_kinds=kinds, attention=backend)
    traced = jax.jit(forward, static_argnums=(0, 1)).trace(
      cfg.on(make_mesh(1, 2, 2)),
      attend,
      tiny_params(cfg),
      tokens,
      positions,
      attention.PackedContext(*listed),
    )
    assert ("shard_map" in str(traced.jaxpr)) == (backend == "pallas")
    compiled = traced.lower().compile()
    hidden[backend], _ = compiled(
      tiny_params(cfg), tokens, positions, attention.PackedContext(*listed)
    )
  np.testing.assert_allclose(hidden["pallas"], hidden["blocks"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"platform": "cpu"}, "needs a TPU, the device is a cpu"),
    ({"keys": 16}, "a config.packing.key_block that is a multiple of 128, it is 16"),
    ({"queries": 2048}, "no memory for blocks of 2048 queries, 256 keys and 4 heads of 64"),
    ({"group": 17, "queries": 128}, "no memory for blocks of 256 queries, 256 keys and 17 heads"),
    ({"head_dim": 512}, "of 512 that share keys: 2097152 numbers, of 1048576"),
  ],
)
def test_what_the_kernels_cannot_do_is_refused(changed, message):
  def check(platform="tpu", queries=1024, keys=256, head_dim=64, group=4, packed=True):
    attention.check_backend(
      "pallas",
      types.SimpleNamespace(platform=platform),
      dtype="bfloat16",
      head_dim=head_dim,
      cap=None,
      group=group,
      packed_blocks=(queries, keys) if packed else None,
    )

  check()
  check(keys=16, packed=False)
  with pytest.raises(UserError, match=message):
    check(**changed)
