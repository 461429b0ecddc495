"""One update is the same on every mesh, parameters are split, impossible meshes are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spo_jax.config import Config, MeshConfig
from spo_jax.config_rules import check_mesh
from spo_jax.errors import UserError
from spo_jax.infra import mesh as meshes
from spo_jax.models.decoder import init_params
from spo_jax.training.packing import PackConfig, pack
from spo_jax.training.prepare import prepare
from spo_jax.training.step import init_state, train_step
from tests.tiny import SGD, loss_config, shard_params, tiny_config, tiny_params
from tests.training.forests import assert_trees_close, own_segments, tree_forest

MODEL = tiny_config(layers=1)
LOSS = loss_config(probability_threshold=0.04, ratio_threshold=1e9, logprob_chunk=16)


def one_update(data, fsdp, tensor, sequence=1, attention="blocks"):
  """(state, metrics) after one update on a mesh."""
  rng = np.random.default_rng(0)
  forest = tree_forest(rng, (2, 2), (3, 3), prompts=(3, 2) * 5)
  cfg = PackConfig(32, rows=8, query_block=16, key_block=8, key_blocks=4, min_micro_batches=2)
  advantages = rng.standard_normal(len(forest.parent)).astype(np.float32)
  packed, counts = pack(forest, advantages, own_segments(forest), cfg)
  assert counts["micro_batches"] == 2
  mesh = meshes.make_mesh(data, fsdp, tensor, sequence=sequence)
  params, ref_params = (shard_params(MODEL, mesh, tiny_params(MODEL, seed)) for seed in (0, 1))
  model = dataclasses.replace(MODEL, attention=attention).on(mesh)
  batch = prepare(model, LOSS, ref_params, meshes.shard_batch(mesh, packed), jnp.int32(2))
  state = init_state(params, SGD)
  # The moments are split as their parameters are.
  adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
  for moment, param in zip(jax.tree.leaves(adam.mu), jax.tree.leaves(params), strict=True):
    assert moment.sharding.is_equivalent_to(param.sharding, param.ndim)
  shardings = jax.tree.map(lambda x: x.sharding, params)
  state, metrics = train_step(model, LOSS, SGD, state, batch, jnp.int32(0), jnp.int32(2))
  return state, metrics, shardings


def is_adam(x) -> bool:
  return hasattr(x, "mu")


@functools.cache
def on_one_device():
  state, metrics, _ = one_update(1, 1, 1)
  return jax.device_get((state.params, metrics))


@pytest.mark.parametrize(
  "shape",
  [(2, 2, 2), (1, 4, 2), (1, 8, 1), (2, 1, 2, 2), (1, 2, 1, 2, "flash")],
)
def test_an_update_on_a_mesh_equals_that_of_one_device(shape):
  want_params, want = on_one_device()
  state, metrics, shardings = one_update(*shape)
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
  before = jax.device_get(tiny_params(MODEL))
  change = lambda params: jax.tree.map(np.subtract, jax.device_get(params), before)
  assert_trees_close(change(state.params), change(want_params), 1e-5)
  assert metrics["grad_norm"] > 0.1
  # What comes out is split as what went in: the next update is the same program.
  for param, sharding in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(shardings), strict=True
  ):
    assert param.sharding.is_equivalent_to(sharding, param.ndim)


def test_tokens_of_a_row_are_split_over_the_sequence_axis():
  mesh = meshes.make_mesh(2, 1, 1, sequence=4)
  x = meshes.hosts.put(np.zeros((2, 8, 3)), lambda _: meshes.NamedSharding(mesh, P()))
  split = jax.jit(lambda x: meshes.split_tokens(mesh, x) + 1)(x)
  assert {shard.data.shape for shard in split.addressable_shards} == {(1, 2, 3)}


def specs(mesh, cfg):
  shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
  return jax.tree.map(lambda s: s.spec, meshes.param_shardings(mesh, shapes))


def test_parameters_are_split_by_the_table():
  mesh = meshes.make_mesh(1, 4, 2)
  got = specs(mesh, MODEL)
  block = got["block_0"]
  assert got["embedding"] == P("tensor", "fsdp") and got["unembedding"] == P("fsdp", "tensor")
  assert block["query"] == block["key"] == block["value"] == P("fsdp", "tensor", None)
  assert block["out"] == P("tensor", None, "fsdp")
  assert block["gate"] == block["up"] == P("fsdp", "tensor")
  assert block["down"] == P("tensor", "fsdp")
  assert block["mlp_norm"]["scale"] == P("fsdp")
  params = shard_params(MODEL, mesh, tiny_params(MODEL))
  for param in jax.tree.leaves(params):
    parts = {str(shard.index): shard.data.size for shard in param.addressable_shards}
    assert sum(parts.values()) == param.size
    assert len(parts) == {1: 4}.get(param.ndim, 8)


def test_an_axis_that_does_not_divide_stays_whole():
  mesh = meshes.make_mesh(1, 2, 4)
  got = specs(mesh, MODEL)  # 2 key-value heads, 4 heads
  assert got["block_0"]["key"] == P("fsdp", None, None)
  assert got["block_0"]["query"] == P("fsdp", "tensor", None)
  got = specs(mesh, dataclasses.replace(MODEL, vocab_size=33, width=15))
  assert got["embedding"] == P(None, None)


def test_arrays_are_placed_by_rows():
  mesh = meshes.make_mesh(2, 2, 2)
  assert meshes.row_shards(mesh) == 4
  x = meshes.shard_rows(mesh, np.arange(24).reshape(8, 3))
  assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
  batch = meshes.shard_batch(mesh, {"a": np.zeros((3, 4, 5)), "n": np.zeros(3)})
  assert {shard.data.shape for shard in batch["a"].addressable_shards} == {(3, 1, 5)}
  assert batch["n"].sharding.is_fully_replicated


def test_meshes_that_do_not_fit_are_refused_with_both_numbers():
  assert dict(meshes.make_mesh(-1, 2, 1).shape) == {
    "data": 4,
    "fsdp": 2,
    "sequence": 1,
    "tensor": 1,
  }
  assert dict(meshes.make_mesh(2, -1, 2).shape) == {
    "data": 2,
    "fsdp": 2,
    "sequence": 1,
    "tensor": 2,
  }
  assert meshes.make_mesh(1, 1, 3).size == 3
  with pytest.raises(
    UserError, match="data 4 x fsdp 2 x sequence 1 x tensor 2 needs 16 devices.* are 8"
  ):
    meshes.make_mesh(4, 2, 2)
  with pytest.raises(
    UserError, match="fsdp 3, sequence 1, tensor 1: 3 does not divide the 8 devices"
  ):
    meshes.make_mesh(-1, 3, 1)
  for wrong in ((0, 1, 1), (-1, 0, 1), (2, -1, -1), (-2, 1, 1), (-1, -2, -2)):
    with pytest.raises(UserError, match="mesh: .* must be positive"):
      meshes.make_mesh(*wrong)


@pytest.mark.parametrize("section, field", [("rollout", "prompts"), ("packing", "rows")])
def test_a_batch_that_cannot_be_divided_is_named(section, field):
  config = Config(mesh=MeshConfig(data=8))
  check_mesh(config, 8)
  part = dataclasses.replace(getattr(config, section), **{field: 12})
  with pytest.raises(UserError, match=rf"config\.{section}\.{field} 12 .* are 8: use a multiple"):
    check_mesh(dataclasses.replace(config, **{section: part}), 8)
