"""The verbs on meshes of 8 virtual CPU devices."""

import dataclasses

import jax
import numpy as np
import pytest

from spo_jax.algorithms.partition import make_partition
from spo_jax.infra.mesh import make_mesh
from spo_jax.models.decode_weights import decode_weights
from spo_jax.sampling.strategies import grow_chain, grow_tree
from tests.sampling.test_quantised import SUMMED
from tests.tiny import shard_params, tiny_config, tiny_params, tiny_prompts, tiny_sampler

CFG = tiny_config(layers=1)
PARTITION = make_partition("fixed", threshold=0.5, interval=1, length=2, parts=1, delimiter_ids=())


def grow(mesh):
  """Params, prefixes, a tree and a chain of the same programs; the second decode refills."""
  params = shard_params(CFG, mesh, tiny_params(CFG))
  sampler = tiny_sampler(CFG, mesh=mesh, slots=16)
  prompts = tiny_prompts(8)
  prefix = sampler.prefill(params, prompts.tokens, prompts.lengths)
  tree = grow_tree(sampler, params, prompts, branches=(4, 4), budgets=(6, 6))
  chain = grow_chain(
    sampler,
    params,
    prompts,
    samples=4,
    probes=2,
    max_new_tokens=6,
    partition=PARTITION,
    cuts_per_group=2,
  )
  return params, prefix, tree, chain


@pytest.fixture(scope="module")
def one_device():
  return grow(make_mesh(1, 1, 1))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4)], ids=str)
def test_sharded_sampling_is_that_of_one_device(one_device, shape):
  mesh = make_mesh(*shape)
  params, prefix, *forests = grow(mesh)
  for got, want in zip(forests, one_device[2:], strict=True):
    for name in ("parent", "tokens", "offsets", "finished", "probe"):
      np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)

  assert_split(shape, params, prefix)


def assert_split(shape, params, prefix):
  """Parameters by their axes, and the cache by rows and heads."""
  data, fsdp, tensor = shape
  # Two key-value heads stay whole over four tensor devices.
  kv_heads = CFG.kv_heads // tensor if CFG.kv_heads % tensor == 0 else CFG.kv_heads
  held = lambda x: x.addressable_shards[0].data.shape
  assert held(params["block_0"]["gate"]) == (CFG.width // fsdp, CFG.ffn // tensor)
  assert held(params["block_0"]["key"]) == (CFG.width // fsdp, kv_heads, CFG.head_dim)
  for cache in jax.tree.leaves(prefix.cache):
    rows, heads, *_ = held(cache)
    assert rows == 8 // (data * fsdp) and heads == kv_heads


def test_int8_is_split_as_floats_are():
  found = []
  for shape in ((1, 1, 1), (2, 2, 2)):
    mesh = make_mesh(*shape)
    params = shard_params(CFG, mesh, tiny_params(CFG))
    sampler = dataclasses.replace(tiny_sampler(CFG, mesh=mesh), weights="int8", cache="int8")
    prompts = tiny_prompts(8)
    prefix = sampler.prefill(params, prompts.tokens, prompts.lengths)
    assert_split(shape, params, prefix)
    found.append(grow_tree(sampler, params, prompts, branches=(4,), budgets=(6,)))
  np.testing.assert_array_equal(found[1].tokens, found[0].tokens)
  np.testing.assert_allclose(found[1].logprobs, found[0].logprobs, atol=1e-5)

  ints = jax.jit(lambda params: decode_weights(CFG, params, "int8"))(params)
  held = lambda x: x.addressable_shards[0].data.shape
  assert ints["block_0"]["gate"].dtype == ints["unembedding"].dtype == np.int8
  for name in SUMMED:
    assert held(ints["block_0"][name]) == held(params["block_0"][name])
  assert held(ints["unembedding"]) == (CFG.width // 2, CFG.vocab_size // 2)
  assert held(ints["block_0"]["gate_scales"]) == (CFG.ffn // 2,)
  assert held(ints["block_0"]["down_scales"]) == (CFG.width // 2,)
