"""Prefill in chunks gives what prefill of whole prompts gives, in the memory of a chunk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.infra.mesh import make_mesh, row_sharding
from spo_jax.models.attention import chunks
from spo_jax.models.decoder import LayerKind
from spo_jax.models.rope import Rope
from spo_jax.sampling import verbs
from spo_jax.sampling.sampler import jit_prefill
from tests.sampling.test_verbs import S, assert_same_segments, in_order, make_groups
from tests.tiny import tiny_config, tiny_params, tiny_prompts, tiny_sampler

R, P = 5, 12
ROPE = Rope(1e4, "exact")
# Layers that see all and layers with a window of less than a chunk.
CFG = tiny_config(layer_kinds=(LayerKind(ROPE), LayerKind(ROPE, window=3)), attention_cap=2.0)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
  """Of keys, so that the loop over them runs more than once."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chunks, "KEY_BLOCK", 3)
    yield


@pytest.fixture(scope="module")
def params():
  return tiny_params(CFG)


@pytest.fixture(scope="module")
def prompts():
  return tiny_prompts(R, longest=P, seed=1)


def prefill(params, prompts, chunk, cfg=CFG):
  sampler = tiny_sampler(cfg, prefill_chunk=chunk)
  return sampler.prefill(params, prompts.tokens, prompts.lengths)


@pytest.fixture(scope="module")
def whole(params, prompts):
  return prefill(params, prompts, 0)


@pytest.mark.parametrize("chunk", [4, 5, 11])
def test_chunks_change_nothing(params, prompts, whole, chunk):
  """Of rows that chunks divide or not; the same continuations are drawn."""
  assert prompts.lengths.min() < 4 and prompts.lengths.max() == P
  prefix = prefill(params, prompts, chunk)
  np.testing.assert_array_equal(prefix.positions, whole.positions)
  for got, want in zip(in_order(prefix), in_order(whole), strict=True):
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
  if chunk == 5:
    groups = make_groups(prompts.tokens, prompts.lengths)
    decode = lambda prefix: tiny_sampler(CFG, temperature=0.8).decode(
      params, prefix, groups, max_new_tokens=S, keep_cache=False
    )
    assert_same_segments(decode(prefix), decode(whole))


def test_chunks_behind_the_longest_prompt_are_left_out(params, prompts):
  short = dataclasses.replace(prompts, lengths=np.minimum(prompts.lengths, 5))
  prefix = prefill(params, short, 4)
  for keys, values in prefix.cache:
    assert np.abs(keys[..., :8]).min() > 0 and not keys[..., 8:].any()
    assert np.abs(values[:, :, :8]).min() > 0 and not values[:, :, 8:].any()


def test_a_chunk_of_a_prompt_or_more_is_the_program_of_whole_prompts(params, prompts):
  rows = row_sharding(make_mesh(1, 1, 1))
  text = lambda chunk: jit_prefill.lower(
    CFG, rows, chunk, "full", params, prompts.tokens, prompts.lengths
  ).as_text()
  assert text(P) == text(0) != text(P - 1)


def test_temporaries_are_those_of_a_chunk():
  cfg = tiny_config(layers=1, attention="flash")
  params = tiny_params(cfg)

  def temporaries(length, chunk):
    prompts = (jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32))
    run = jax.jit(lambda *prompts: verbs.prefill(cfg, params, *prompts, chunk=chunk))
    return run.lower(*prompts).compile().memory_analysis().temp_size_in_bytes

  short, long = (temporaries(length, 64) for length in (1024, 4096))
  assert long == short
  assert temporaries(4096, 0) > 5 * long
