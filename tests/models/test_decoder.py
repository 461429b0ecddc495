import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from spo_jax.infra.mesh import PARAM_RULES
from spo_jax.models.attention import PackedContext, attend_packed, attend_prefill, flash
from spo_jax.models.decoder import (
  REMATS,
  LayerKind,
  cast_weights,
  count_params,
  forward,
  init_params,
  unembedding,
)
from spo_jax.models.rope import Rope, rotary_tables, rotate, take_tables
from spo_jax.training.key_blocks import visible_blocks
from tests.models.test_attention import ancestors, random_row
from tests.tiny import VOCAB, tiny_config, tiny_params

T = 16


def run(cfg, params, tokens, positions=None):
  positions = np.arange(T)[None] if positions is None else positions
  positions = np.broadcast_to(positions, tokens.shape)
  forward_ = jax.jit(forward, static_argnums=(0, 1), static_argnames="longest")
  return forward_(cfg, attend_prefill, params, tokens, positions, longest=3 * T)[0]


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).permutation(VOCAB)[None, :T].astype(np.int32)


@pytest.mark.parametrize("packed", [False, True])
def test_a_state_depends_on_what_it_continues_alone(tokens, packed):
  """The gradient of state i by the embedding of token j is zero unless i continues j."""
  cfg = tiny_config()
  params = tiny_params(cfg)
  prev, until = random_row(np.random.default_rng(5), T) if packed else (range(-1, T - 1), [T] * T)
  until = np.array([until], np.int32)
  attend = attend_packed if packed else attend_prefill
  blocks = PackedContext(until.reshape(1, -1, 2), visible_blocks(until, 4, 2, 0))
  context = blocks if packed else None
  direction = jax.random.normal(jax.random.key(1), (cfg.width,))
  positions = np.arange(T)[None]

  @jax.jit
  @jax.jacrev
  def by_embedding(embedding):
    changed = params | {"embedding": embedding}
    return forward(cfg, attend, changed, tokens, positions, context)[0][0] @ direction

  jacobian = np.asarray(by_embedding(params["embedding"]))[:, tokens[0]]
  np.testing.assert_array_equal(np.abs(jacobian).max(-1) > 1e-8, ancestors(list(prev)))


def test_remat_changes_what_is_kept_and_computed_twice_but_no_gradient(monkeypatch):
  """With "dots" hardly anything is computed twice, and no attention.

  Kept bytes are those that the backward pass is given: on a CPU the compiler computes early what is
  to be computed late, and the temporaries of the whole hardly tell.
  """
  monkeypatch.setattr(flash, "CAUSAL_BLOCK", 32)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (4, 64)).astype(np.int32)
  positions = np.broadcast_to(np.arange(64), tokens.shape)
  params = tiny_params(tiny_config(layers=1, ffn=64))

  def measure(remat):
    cfg = tiny_config(layers=1, attention="flash", remat=remat, ffn=64)

    def loss(params):
      return jnp.mean(jnp.sin(forward(cfg, attend_prefill, params, tokens, positions)[0]))

    kept = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    return (
      compiled(params),
      sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)),
      compiled.cost_analysis()["flops"],
      compiled.as_text().count(" while("),
    )

  found = {remat: measure(remat) for remat in REMATS}
  grads, kept, flops, loops = (
    dict(zip(found, of_all, strict=True)) for of_all in zip(*found.values(), strict=True)
  )
  for other in ("blocks", "dots"):
    for x, y in zip(*(jax.tree.leaves(grads[name]) for name in (other, "none")), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
  assert kept["blocks"] < kept["dots"] < kept["none"]
  assert flops["none"] <= flops["dots"] < flops["blocks"]
  assert loops["none"] == loops["dots"] < loops["blocks"]


def test_scales_and_biases_of_one_row_are_summed_over_both_axes_at_once(tokens):
  """XLA's loop on a CPU takes ten times as long for a sum along T that keeps the other axis."""
  cfg = tiny_config(layers=1, qkv_bias=True)
  positions = np.arange(T)[None]

  def loss(params):
    states, _ = forward(cfg, attend_prefill, params, tokens[:1], positions)
    return jnp.sum(jnp.sin(states))

  text = str(jax.make_jaxpr(jax.grad(loss))(tiny_params(cfg)))
  # Of norms, and of the biases of query, key and value.
  assert text.count("reduce_sum[axes=(0, 1)") == 3 + 3
  assert "reduce_sum[axes=(1,)" not in text


KINDS = (LayerKind(Rope(1e4, "exact")), LayerKind(Rope(1e3, "exact"), window=3))


@pytest.mark.parametrize(
  ("kinds", "remat"),
  [(KINDS[:1], "none"), (KINDS, "blocks"), (KINDS[:1] * 6, "blocks"), (KINDS * 3, "none")],
)
def test_scanned_layers_are_the_layers(tokens, kinds, remat):
  """States, gradients and caches; the last layer, whose states are read in part, is no turn. Kinds
  that are named layer by layer, as checkpoints do, are a turn of those that differ."""
  cfg = tiny_config(layers=6, layer_kinds=kinds, remat=remat)
  params = tiny_params(cfg)
  positions, read = np.arange(T)[None], np.array([[3, 9]])

  def results(cfg):
    def loss(params):
      states, caches = forward(
        cfg, attend_prefill, params, tokens, positions, read_BxR=read, longest=T
      )
      return jnp.sum(jnp.sin(states)), (states, caches)

    traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(params)
    text = str(traced.jaxpr)
    assert ("remat" in text) == (remat == "blocks")
    return traced.lower().compile()(params), text.count("dot_general")

  (plain, in_plain), (scanned, in_scanned) = map(
    results, (cfg, dataclasses.replace(cfg, scan_layers=True))
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), plain, scanned)
  different = len(set(kinds))  # and as many that make no whole turn, with the last
  assert in_scanned / in_plain <= 2 * different / cfg.layers


def test_scanned_layers_have_the_parameters_of_the_layers():
  cfg = tiny_config(layers=3)
  shapes = lambda cfg: jax.tree.map(jnp.shape, tiny_params(cfg))
  assert shapes(cfg) == shapes(dataclasses.replace(cfg, scan_layers=True))


def test_tied_unembedding_is_the_transposed_embedding():
  tied, untied = tiny_config(tie_embeddings=True), tiny_config()
  tied_params, untied_params = tiny_params(tied), tiny_params(untied)
  np.testing.assert_array_equal(unembedding(tied, tied_params), tied_params["embedding"].T)
  np.testing.assert_array_equal(unembedding(untied, untied_params), untied_params["unembedding"])
  assert set(untied_params) - set(tied_params) == {"unembedding"}


def test_bfloat16_is_of_activations_only(tokens):
  cfg = tiny_config(dtype="bfloat16")
  params = tiny_params(cfg)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  hidden = run(cfg, params, tokens)
  assert hidden.dtype == jnp.bfloat16
  exact = run(tiny_config(), params, tokens)
  error = np.abs(hidden.astype(np.float32) - exact)
  assert error.max() < 0.1 and error.mean() < 0.02
  # It is the dtype that is tested, not a lucky equality.
  assert error.max() > 1e-4


def test_rotary_positions_are_relative(tokens):
  q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
  tables = rotary_tables(Rope(100.0), 30, 8)
  at = lambda x, position: rotate(x, take_tables(tables, np.full((1, 1), position)))
  product = lambda i, j: np.sum(at(q, i) * at(k, j))
  np.testing.assert_allclose(product(9, 4), product(25, 20), rtol=1e-4)
  np.testing.assert_allclose(product(5, 0), np.sum(at(q, 5) * k), rtol=1e-5)
  assert abs(product(9, 4) - product(9, 5)) > 1e-2
  np.testing.assert_allclose(np.linalg.norm(at(q, 7)), np.linalg.norm(q), rtol=1e-5)

  cfg = tiny_config()
  params = tiny_params(cfg)
  hidden = run(cfg, params, tokens)
  shifted = run(cfg, params, tokens, np.arange(T)[None] + 11)
  stretched = run(cfg, params, tokens, 2 * np.arange(T)[None])
  np.testing.assert_allclose(hidden, shifted, atol=2e-5)
  assert np.abs(hidden - stretched).max() > 1e-2


def test_parameters_are_counted_and_every_matrix_has_logical_axes():
  cfg = tiny_config()
  boxed = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
  D, F, V, heads = cfg.width, cfg.ffn, cfg.vocab_size, cfg.heads + cfg.kv_heads
  block = 2 * D * heads * cfg.head_dim + 3 * D * F + 2 * D
  assert count_params(boxed) == cfg.layers * block + 2 * V * D + D
  boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
  assert len(boxes) == 9 * cfg.layers + 3
  for box in boxes:
    assert len(box.names) == box.value.ndim
    named = [name for name in box.names if name]
    assert set(named) <= set(PARAM_RULES) and len(named) == min(box.value.ndim, 2)
    mesh_axes = [PARAM_RULES[name] for name in named]
    assert len(set(mesh_axes)) == len(mesh_axes)


def test_cast_weights_change_no_result_and_leave_norms_alone(tokens):
  cfg = tiny_config(dtype="bfloat16")
  # Numbers of which bfloat16 loses digits.
  uneven = lambda x: x + 1e-3 * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) / x.size
  params = jax.tree.map(uneven, tiny_params(cfg))
  cast = cast_weights(cfg, params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
    assert leaf.dtype == (jnp.float32 if path[-1].key == "scale" else jnp.bfloat16)
  np.testing.assert_array_equal(run(cfg, cast, tokens), run(cfg, params, tokens))
