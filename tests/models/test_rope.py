import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from spo_jax.models.attention import attend_prefill
from spo_jax.models.decoder import forward, token_logits
from spo_jax.models.hf_rope import GLOBAL, read_ropes
from spo_jax.models.rope import Rope, frequencies, rotary_tables, take_tables
from tests.models import hf_models
from tests.models.hf_models import VOCAB, hf_logits

KINDS = ("default", "linear", "llama3", "yarn")
LLAMA3 = hf_models.LLAMA3 | {"original_max_position_embeddings": 2048}
YARN = hf_models.YARN | {"original_max_position_embeddings": 2048}
SCALINGS = {
  "default": {"rope_type": "default", "rope_theta": 1e6},
  "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
  "llama3": LLAMA3,
  "yarn": YARN,
  "yarn-attention-factor": YARN | {"attention_factor": 1.3},
  "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4, "truncate": False},
  "yarn-betas": YARN | {"beta_fast": 16, "beta_slow": 2, "factor": 40.0},
  "yarn-step": YARN | {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
}
LONGEST = 8192


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_tables_are_those_of_transformers_up_to_8k(name, head_dim):
  fields = {"head_dim": head_dim, "max_position_embeddings": LONGEST}
  fields["rope_parameters"] = dict(SCALINGS[name])
  theirs = LlamaRotaryEmbedding(LlamaConfig(**fields))
  rope = read_ropes(fields, KINDS, local_theta=False)[GLOBAL]
  np.testing.assert_array_max_ulp(frequencies(rope, head_dim), theirs.inv_freq.numpy(), maxulp=3)

  want = theirs(torch.zeros(()), torch.arange(LONGEST)[None])
  got = rotary_tables(rope, LONGEST, head_dim)
  for ours, table in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, table[0, :, : head_dim // 2], atol=1e-3)


@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn"])
def test_logits_at_8k_positions_are_those_of_transformers(name):
  """Positions are strided: only distances of thousands tell the scalings apart."""
  fields = {"head_dim": 16, "rope_parameters": dict(SCALINGS[name]), "num_hidden_layers": 1}
  model, cfg, params = hf_models.both("llama", fields | {"max_position_embeddings": LONGEST})
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 12)).astype(np.int32)
  positions = np.stack([np.arange(12) * 743, LONGEST - 12 + np.arange(12)]).astype(np.int32)
  run = jax.jit(forward, static_argnums=(0, 1), static_argnames="longest")
  hidden, _ = run(cfg, attend_prefill, params, tokens, positions, longest=LONGEST)
  want = hf_logits(model, tokens, positions=positions)
  gap = np.abs(token_logits(cfg, params, hidden) - want).max() / np.abs(want).max()
  assert gap < 1e-4, gap


def test_a_position_beyond_the_tables_is_not_a_number():
  cos, sin = take_tables(rotary_tables(Rope(100.0), 4, 8), np.array([[3, 4]]))
  assert np.isfinite(cos[0, 0]).all() and np.isfinite(sin[0, 0]).all()
  assert np.isnan(cos[0, 1]).all() and np.isnan(sin[0, 1]).all()


def test_scalings_differ():
  ropes = [
    read_ropes({"rope_parameters": fields}, KINDS, local_theta=False)[GLOBAL]
    for fields in SCALINGS.values()
  ]
  tables = {(frequencies(rope, 64).tobytes(), rope.attention_factor) for rope in ropes}
  assert len(tables) == len(SCALINGS)


def test_an_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="unknown kind of RoPE 'dynamic'"):
    frequencies(Rope(1e4, "dynamic"), 8)
