"""Figures of speed, against numbers worked out by hand."""

import dataclasses
from typing import Any

import jax
import pytest

from spo_jax.infra import speed
from spo_jax.infra.topology import GIB
from spo_jax.models.decoder import DecoderConfig, LayerKind, init_params, weights_per_token
from spo_jax.models.rope import Rope


@dataclasses.dataclass
class Device:
  """Stands for an accelerator."""

  device_kind: str
  stats: dict[str, Any] | None = None

  def memory_stats(self) -> dict[str, Any] | None:
    return self.stats


METRICS = {"train/packed_tokens": 3000, "time/update_s": 2.0, "time/rollout_s": 4.0}


def measured(kind: str, **changes) -> dict[str, float]:
  fields = {
    "trained_s": 6.0,
    "began_at": 0.0,
    "sampled": 1000,
    "weights": 10**9,
    "epochs": 2,
    "devices": [Device(kind)] * 4,
  }
  return speed.measure(METRICS, **fields | changes)


def test_rates_and_utilisation():
  metrics = measured("TPU v5 lite")
  assert metrics["speed/sampled_tokens_s"] == 250
  assert metrics["speed/trained_tokens_s"] == 1500
  # 6 FLOPs x 1e9 weights x 3000 tokens x 2 epochs in 2 seconds on 4 devices.
  assert metrics["speed/mfu"] == pytest.approx(1.8e13 / 4 / 197e12)
  assert "speed/mfu" not in measured("cpu")


def test_goodput_counts_the_time_between_processes():
  assert speed.goodput(trained_s=6.0, began_at=100.0, now=108.0) == 0.75
  assert speed.goodput(trained_s=6.0, began_at=100.0, now=124.0) == 0.25


def test_memory_is_of_the_fullest_device():
  devices = [Device("", {"peak_bytes_in_use": size * GIB}) for size in (3, 5, 4)]
  assert speed.peak_memory(devices) == {"speed/memory_gib": 5}
  assert speed.peak_memory([Device(""), Device("", {"num_allocs": 1})]) == {}
  assert "speed/memory_gib" not in measured("cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_a_token_are_those_of_blocks_and_unembedding(tied):
  cfg = DecoderConfig(
    vocab_size=11,
    width=8,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=4,
    ffn=16,
    layer_kinds=(LayerKind(Rope(10000.0, "exact")),),
    norm_eps=1e-6,
    tie_embeddings=tied,
    dtype="float32",
    remat="none",
    attention="blocks",
  )
  params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
  attention = 8 * (2 + 1 + 1) * 4 + 2 * 4 * 8
  of_block = attention + 3 * 8 * 16 + 2 * 8  # and two norms
  assert weights_per_token(cfg, params) == 2 * of_block + 8 * 11
