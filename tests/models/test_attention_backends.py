"""Backends of attention: the same numbers, chosen by config; flash in linear memory, on a mesh."""

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
from spo_jax.models.attention import AttentionSpec, blocks, cudnn, flash
from spo_jax.models.decoder import LayerKind, forward
from spo_jax.models.rope import Rope
from spo_jax.training.key_blocks import visible_blocks
from tests.models.test_attention import ROUNDING, ancestors, dense_attention, random_row
from tests.tiny import VOCAB, tiny_config, tiny_params

DH = 8
SPEC = AttentionSpec(DH**-0.5)


def random_qkv(B, T, H=4, K=2, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=(B, T, heads, DH)), dtype) for heads in (H, K, K))


def gradients(interval_attention, spec=SPEC):
  """The compiled gradient of a function of all outputs, by q, k and v."""

  def loss(qkv, *listed):
    return jnp.sum(jnp.sin(3 * interval_attention(*qkv, *listed, spec).astype(jnp.float32)))

  return jax.jit(jax.grad(loss))


def random_forests(B, T, queries, keys):
  """(positions, until, key blocks) of rows of random trees."""
  prev, until = zip(*[random_row(np.random.default_rng(row), T) for row in range(B)], strict=True)
  until = np.array(until, np.int32)
  positions = np.array([ancestors(row).sum(-1) - 1 for row in prev], np.int32)
  return positions, until.reshape(B, -1, keys), visible_blocks(until, queries, keys, 0)


def path(T, block):
  """(positions, until, key blocks) of one row that is one path."""
  until = np.full((1, T), T, np.int32)
  blocks_ = visible_blocks(until, block, block, 0)
  return np.arange(T, dtype=np.int32)[None], until.reshape(1, -1, block), blocks_


def test_scores_of_bfloat16_inputs_are_float32(monkeypatch):
  """Scores of size 30, which bfloat16 would round by up to 0.06, are exact to the last bits."""
  monkeypatch.setattr(flash, "SCORES", 100)
  spec = AttentionSpec(4.0)
  listed = random_forests(2, 24, 8, 4)
  halves = random_qkv(2, 24, dtype=jnp.bfloat16)
  singles = tuple(x.astype(jnp.float32) for x in halves)
  value = jax.jit(lambda qkv: flash.interval_attention(*qkv, *listed, spec))
  got = (value(halves), gradients(flash.interval_attention, spec)(halves, *listed))
  want = (value(singles), gradients(flash.interval_attention, spec)(singles, *listed))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert x.dtype == jnp.bfloat16
    assert np.abs(x.astype(jnp.float32) - y).max() < 0.012 * np.abs(y).max()


@pytest.mark.parametrize("window", [None, 1, 3, 8, 9, 10])
@pytest.mark.parametrize("T", [7, 24, 27])
def test_causal_attention_of_every_backend(monkeypatch, T, window):
  """Blocks of 8 keys, of which a window of 9 reaches one back, and one of 10 two."""
  monkeypatch.setattr(flash, "CAUSAL_BLOCK", 8)
  monkeypatch.setattr(flash, "SCORES", 100)
  spec = AttentionSpec(0.7, window)
  qkv = random_qkv(2, T)
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
  index = np.arange(T)
  visible = index <= index[:, None]
  if window is not None:
    visible &= index[:, None] - index < window
  want = jax.vmap(lambda q, k, v: dense_attention(q, k, v, visible, spec.scale))(*qkv)
  xla = functools.partial(cudnn.causal_attention, implementation="xla")
  for causal_attention in (blocks.causal_attention, flash.causal_attention, xla):
    got = jax.jit(causal_attention, static_argnums=4)(*qkv, positions, spec)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_memory_is_linear_in_the_length_of_a_path():
  def temporaries(interval_attention, T):
    compiled = gradients(interval_attention).lower(random_qkv(1, T), *path(T, 128)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = (temporaries(flash.interval_attention, T) for T in (512, 2048))
  assert long < 4.2 * short
  assert temporaries(blocks.interval_attention, 2048) > 4 * long


def test_no_array_is_larger_than_the_queries(monkeypatch):
  """Where a head has no more scores at a time than the queries have numbers."""
  T, (q, k, v) = 2048, random_qkv(1, 2048)
  monkeypatch.setattr(flash, "SCORES", T * DH)
  text = gradients(flash.interval_attention).lower((q, k, v), *path(T, 128)).compile().as_text()
  sizes = {
    np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\[([\d,]+)\]", text)
  }
  assert max(sizes) == q.size


def test_flash_gives_nothing_to_and_takes_nothing_from_a_query_that_sees_no_key():
  """The first row's keys are listed, and seen by nobody."""
  positions, until, listed = random_forests(2, 16, 8, 8)
  until[0] = 0
  qkv = random_qkv(2, 16)
  mixed = jax.jit(flash.interval_attention, static_argnums=6)(*qkv, positions, until, listed, SPEC)
  grads = gradients(flash.interval_attention)(qkv, positions, until, listed)
  for x in (mixed, *grads):
    assert not x[0].any() and x[1].any()


def test_padding_of_the_list_is_left_out_of_sums_over_blocks():
  total = jnp.zeros((1, 1, 3, 2, 1))
  got = flash._add(total, jnp.array([[1, -1, -1]]), jnp.ones((1, 1, 6, 1)))
  np.testing.assert_array_equal(got[0, 0, :, :, 0], [[0, 0], [1, 1], [0, 0]])


def test_rows_and_heads_are_split_over_a_mesh_without_gathering(monkeypatch):
  monkeypatch.setattr(flash, "SCORES", 100)
  mesh = make_mesh(2, 2, 2)
  qkv, listed = random_qkv(4, 32), random_forests(4, 32, 8, 4)
  place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  split_qkv = tuple(place(x, ROWS, None, "tensor") for x in qkv)
  split_listed = tuple(place(x, ROWS) for x in listed)
  compiled = gradients(flash.interval_attention).lower(split_qkv, *split_listed).compile()
  # Of collectives there is one that agrees on how many chunks each block of queries has.
  found = re.findall(
    r"= (.*) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\b",
    compiled.as_text(),
  )
  assert found and all(kind == "all-reduce" and "f32" not in shape for shape, kind in found), found
  got = compiled(split_qkv, *split_listed)
  for x, y, z in zip(got, gradients(blocks.interval_attention)(qkv, *listed), qkv, strict=True):
    assert x.sharding.shard_shape(x.shape) == (1, 32, z.shape[2] // 2, DH)
    np.testing.assert_allclose(x, y, **ROUNDING)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "prefill"])
def test_a_config_chooses_the_backend(packed):
  kinds = (LayerKind(Rope(1e4, "exact")), LayerKind(Rope(1e4, "exact"), window=4))
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 16)).astype(np.int32)
  positions, *listed = random_forests(2, 16, 8, 4)
  context = attention.PackedContext(*listed)
  attend = attention.attend_packed if packed else attention.attend_prefill
  hidden = {}
  for backend in ("blocks", "flash"):
    cfg = tiny_config(layer_kinds=kinds, attention_cap=2.0, attention=backend)
    if not packed:
      positions = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    traced = jax.jit(forward, static_argnums=(0, 1)).trace(
      cfg, attend, tiny_params(cfg), tokens, positions, context
    )
    # Flash alone has a backward pass of its own.
    assert (f"name={flash._attention.__name__}" in str(traced.jaxpr)) == (backend == "flash")
    hidden[backend], _ = traced.lower().compile()(tiny_params(cfg), tokens, positions, context)
  np.testing.assert_allclose(hidden["flash"], hidden["blocks"], rtol=1e-5, atol=1e-5)


def test_cudnn_prefills_and_leaves_forests_to_flash(monkeypatch):
  spec = AttentionSpec(1.0, backend="cudnn")
  qkv, (positions, *listed) = random_qkv(1, 16), random_forests(1, 16, 8, 4)
  packed = lambda qkv: attention.attend_packed(
    *qkv, positions, attention.PackedContext(*listed), None, spec
  )
  assert "custom_vjp" in str(jax.make_jaxpr(packed)(qkv))
  asked = []
  monkeypatch.setattr(
    jax.nn, "dot_product_attention", lambda *qkv, **kw: asked.append(kw) or qkv[0]
  )
  attention.attend_prefill(*qkv, positions, None, None, spec)
  assert [kw["implementation"] for kw in asked] == ["cudnn"]


@pytest.mark.parametrize(
  "device, changed, message",
  [
    ({"platform": "cpu"}, {}, "needs an NVIDIA GPU, the device is a cpu"),
    ({}, {"dtype": "float32"}, "needs config.compute.dtype bfloat16, it is float32"),
    ({}, {"cap": 50.0}, "no soft cap, and the model's is 50.0: use 'flash'"),
    ({}, {"head_dim": 36}, "a multiple of 8, at most 256 on this GPU, and the model's are of 36"),
    ({"compute_capability": "8.9"}, {"head_dim": 256}, "at most 128 on this GPU"),
  ],
)
def test_what_cudnn_cannot_do_is_refused(device, changed, message):
  gpu = {"platform": "gpu", "compute_capability": "9.0"}
  model = {"dtype": "bfloat16", "head_dim": 256, "cap": None}
  attention.check_backend("cudnn", types.SimpleNamespace(**gpu), **model)
  with pytest.raises(UserError, match=message):
    attention.check_backend("cudnn", types.SimpleNamespace(**gpu | device), **model | changed)
  attention.check_backend("flash", types.SimpleNamespace(**gpu | device), **model | changed)
