"""Causal attention by cuDNN's flash kernels, for prefill on NVIDIA GPUs.

A packed forest is not for them: its mask would be an array of T x T.
"""

import jax

from spo_jax.errors import UserError
from spo_jax.models.attention.spec import AttentionSpec

HOPPER = 9  # compute capability, from which on heads may be twice as large


def causal_attention(
  q_BxTxHxDh: jax.Array,
  k_BxTxKxDh: jax.Array,
  v_BxTxKxDh: jax.Array,
  positions_BxT: jax.Array,
  spec: AttentionSpec,
  implementation: str = "cudnn",
) -> jax.Array:
  """As `blocks.causal_attention`, without a cap; a window counts tokens of the row.

  `implementation` is that of `jax.nn.dot_product_attention`.
  """
  del positions_BxT  # of consecutive tokens
  return jax.nn.dot_product_attention(
    q_BxTxHxDh,
    k_BxTxKxDh,
    v_BxTxKxDh,
    scale=spec.scale,
    is_causal=True,
    local_window_size=None if spec.window is None else (spec.window - 1, 0),
    implementation=implementation,
  )


def check(device: jax.Device, *, dtype: str, head_dim: int, cap: float | None) -> None:
  """Checks that the kernels can compute a decoder's attention on a device.

  Args:
    device: where it would run.
    dtype: of activations.
    head_dim: size of a head.
    cap: soft cap of the scores.

  Raises:
    UserError: naming what they do not have.
  """
  instead = "use 'flash' (config.compute.attention)"
  if device.platform != "gpu":
    raise UserError(f"attention 'cudnn' needs an NVIDIA GPU, the device is a {device.platform}")
  if dtype != "bfloat16":
    raise UserError(f"attention 'cudnn' needs config.compute.dtype bfloat16, it is {dtype}")
  if cap is not None:
    raise UserError(f"attention 'cudnn' has no soft cap, and the model's is {cap}: {instead}")
  most = 256 if float(device.compute_capability) >= HOPPER else 128
  if head_dim % 8 or head_dim > most:
    raise UserError(
      f"attention 'cudnn' needs heads of a multiple of 8, at most {most} on this GPU, and the "
      f"model's are of {head_dim}: {instead}"
    )
