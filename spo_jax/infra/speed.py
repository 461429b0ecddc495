"""How fast an iteration was, and how much of the machines it used: metrics named `speed/`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from spo_jax.infra.topology import GIB

TRAIN_FLOPS = 6  # a weight and token: a product forwards and two backwards, of 2 FLOPs each

# FLOPs a second of a device in bfloat16 without sparsity, as its maker publishes them, by the name
# that JAX has for it. A "TPU v5" is sold as v5p, the "lite" ones as v5e and v6e.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H200": 989e12,
}


def measure(
  metrics: Mapping[str, float],
  *,
  trained_s: float,
  began_at: float,
  sampled: int,
  weights: int,
  epochs: int,
  devices: Sequence[jax.Device],
) -> dict[str, float]:
  """Metrics of an iteration whose update is done.

  Args:
    metrics: its other metrics.
    trained_s: see `goodput`; the iteration is counted.
    began_at: likewise.
    sampled: tokens that were sampled.
    weights: numbers that a token is multiplied with, of blocks and unembedding.
    epochs: times that the packed batch was trained on.
    devices: of all processes that share the update.
  """
  packed, seconds = metrics["train/packed_tokens"], metrics["time/update_s"]
  flops = TRAIN_FLOPS * weights * packed * epochs
  return {
    "speed/sampled_tokens_s": sampled / metrics["time/rollout_s"],
    "speed/trained_tokens_s": packed / seconds,
    **utilisation(flops / seconds / len(devices), devices[0].device_kind),
    "speed/goodput": goodput(trained_s, began_at, time.time()),
    **peak_memory(jax.local_devices()),
  }


def utilisation(flops_s: float, device_kind: str) -> dict[str, float]:
  """Share of a device's peak that a rate of FLOPs is; nothing where the peak is not known.

  As is usual for such shares, what is computed anew in a backward pass does not count. Attention's
  own products do not count either, nor do reference policy and critic; the unembedding counts for
  all packed tokens, though with `packing.loss_length` not all pass through it.
  """
  peak = PEAK_FLOPS.get(device_kind)
  return {} if peak is None else {"speed/mfu": flops_s / peak}


def goodput(trained_s: float, began_at: float, now: float) -> float:
  """Share of the time since a run began that went into the iterations which made its policy.

  The rest is warm start, evaluation, checkpoints, time between processes, and iterations that were
  lost with a process. Compiling counts as part of the iteration that waits for it.

  Args:
    trained_s: seconds of these iterations, from sampling to the end of the update.
    began_at: Unix time.
    now: likewise.
  """
  return trained_s / (now - began_at)


def peak_memory(devices: Sequence[Any]) -> dict[str, float]:
  """GiB that the fullest device has had in use at once; nothing where devices do not tell."""
  told = [stats for device in devices if (stats := device.memory_stats())]
  peaks = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
  return {"speed/memory_gib": max(peaks) / GIB} if peaks else {}
