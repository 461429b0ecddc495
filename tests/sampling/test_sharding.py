"""The verbs on meshes of 8 virtual CPU devices."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from spo_jax.algorithms.partition import make_partition
from spo_jax.infra.mesh import make_mesh, shard_rows, spread_shardings
from spo_jax.models.decode_weights import decode_weights
from spo_jax.models.decoder import init_params
from spo_jax.planning.collectives import collectives
from spo_jax.sampling.sampler import jit_decode
from spo_jax.sampling.strategies import grow_chain, grow_tree
from spo_jax.sampling.verbs import Groups
from tests.sampling.test_quantised import SUMMED
from tests.tiny import shard_params, tiny_config, tiny_params, tiny_prompts, tiny_sampler

CFG = tiny_config(layers=1)
PARTITION = make_partition("fixed", threshold=0.5, interval=1, length=2, parts=1, delimiter_ids=())


def grow(mesh):
  """Params, prefixes, a tree and a chain of the same programs; the second decode refills."""
  params = shard_params(CFG, mesh, tiny_params(CFG))
  sampler = tiny_sampler(CFG.on(mesh), mesh=mesh, slots=16)
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


def norms_of(block):
  """The norms among a block's parameters."""
  return [x for name, x in block.items() if name.endswith("_norm")]


def compiled_decode(mesh, cfg, *, rows, n, slots):
  """(its config, parameters, text) of the compiled decode of `rows` groups of n."""
  params = shard_params(cfg, mesh, tiny_params(cfg))
  sampler = tiny_sampler(cfg.on(mesh), mesh=mesh, slots=slots)
  prompts = tiny_prompts(rows)
  prefix = sampler.prefill(params, prompts.tokens, prompts.lengths)
  grid = np.ones((rows, n), np.int32)
  keys = jax.random.split(jax.random.key(0), grid.shape)
  groups = shard_rows(mesh, Groups(None, 3 * grid, 5 * grid, grid, keys))
  decode_cfg = sampler.decode_config(5, keep_cache=False)
  lowered = jit_decode.lower(sampler.cfg, decode_cfg, params, prefix, groups)
  return decode_cfg, params, lowered.compile().as_text()


def shapes_in(text):
  """Shapes of float32 arrays in a program, without axes of one."""
  shapes = {tuple(map(int, x.split(","))) for x in re.findall(r"f32\[([\d,]+)\]", text)}
  return {tuple(size for size in shape if size > 1) for shape in shapes}


def held(x):
  """The shape of what one device has of an array."""
  return x.addressable_shards[0].data.shape


@pytest.fixture(scope="module")
def one_device():
  return grow(make_mesh(1, 1, 1))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
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
  assert held(params["block_0"]["gate"]) == (CFG.width // fsdp, CFG.ffn // tensor)
  assert held(params["block_0"]["key"]) == (CFG.width // fsdp, kv_heads, CFG.head_dim)
  for cache in jax.tree.leaves(prefix.cache):
    rows, heads, *_ = held(cache)
    assert rows == 8 // (data * fsdp) and heads == kv_heads


def test_prompts_in_chunks_are_split_as_whole_ones(one_device):
  mesh = make_mesh(1, 4, 2)
  params = shard_params(CFG, mesh, tiny_params(CFG))
  prompts = tiny_prompts(8)
  prefix = tiny_sampler(CFG.on(mesh), mesh=mesh, prefill_chunk=4).prefill(
    params, prompts.tokens, prompts.lengths
  )
  for got, want in zip(jax.tree.leaves(prefix), jax.tree.leaves(one_device[1]), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  for cache in jax.tree.leaves(prefix.cache):
    assert held(cache)[:2] == (2, CFG.kv_heads // 2)


def test_a_step_sends_rows_and_no_summands():
  """Where fsdp splits the weights, decode has them split by what they give: no device holds logits
  or channels of all rows. Those of attention and norms are gathered once, for all chunks of the
  suffix."""
  cfg, rows, n = tiny_config(layers=1, ffn=80, vocab_size=144), 8, 3
  decode_cfg, params, text = compiled_decode(make_mesh(1, 8, 1), cfg, rows=rows, n=n, slots=64)
  shapes = shapes_in(text)
  assert (rows * n, cfg.ffn // 8) in shapes and (rows * n, cfg.vocab_size // 8) in shapes
  assert (rows * n, cfg.ffn) not in shapes and (rows * n, cfg.vocab_size) not in shapes
  assert (n, cfg.vocab_size) in shapes  # each device draws for its own rows

  assert len(decode_cfg.chunks()) > 1
  gathered = {one.loops: one for one in collectives(text) if one.kind == "all-gather"}[0]
  attention = [params["block_0"][name] for name in ("query", "key", "value", "out")]
  scales = [norm["scale"] for norm in (params["final_norm"], *norms_of(params["block_0"]))]
  assert gathered.count == len(attention) + len(scales)
  assert gathered.received == sum(x.nbytes for x in (*attention, *scales)) * 7 / 8


def test_a_refill_moves_the_caches_of_as_many_groups_as_it_waits_for():
  """Four of sixteen slots, not all: each device has two slots, and three of the 24 prefixes."""
  _, _, text = compiled_decode(make_mesh(8, 1, 1), CFG, rows=24, n=3, slots=16)
  prompt = tiny_prompts(1).tokens.shape[1]
  cache = lambda groups: (groups, CFG.kv_heads, CFG.head_dim, prompt)
  shapes = shapes_in(text)
  assert {cache(2), cache(3), cache(4)} <= shapes
  assert cache(16) not in shapes and cache(24) not in shapes


@pytest.mark.parametrize(("ffn", "held_ffn"), [(80, (16, 10)), (20, (2, 20))])
def test_no_device_of_decode_has_a_whole_feed_forward_layer(ffn, held_ffn):
  """Where devices do not divide its channels it stays split along the width."""
  mesh = make_mesh(1, 8, 1)
  cfg = tiny_config(layers=1, ffn=ffn)
  boxed = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
  shardings = spread_shardings(mesh, boxed)["block_0"]
  held = lambda name, shape: shardings[name].shard_shape(shape)
  assert held("gate", (16, ffn)) == held_ffn and held("down", (ffn, 16)) == held_ffn[::-1]
  assert held("query", (16, 4, 8)) == (16, 4, 8)


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
