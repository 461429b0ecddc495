"""The rotary fields of a Hugging Face config.json, of every version of `transformers`."""

import math
from typing import Any

from spo_jax.errors import UserError
from spo_jax.models.rope import Rope

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # types of layers in config.json


def choice(name: str, value, known):
  """The value, if it is known.

  Raises:
    UserError: naming the field and what it may be, otherwise.
  """
  if value not in known:
    raise UserError(f"config.json: {name} {value!r} is not supported, only {', '.join(known)}")
  return value


def read_ropes(hf: dict[str, Any], kinds: tuple[str, ...], *, local_theta: bool) -> dict[str, Rope]:
  """RoPE by type of layer, from `rope_scaling` (old) or `rope_parameters` (transformers 5).

  Args:
    hf: the contents of config.json.
    kinds: that the family's global layers may have.
    local_theta: local layers have a base of their own, and no scaling (Gemma 3).

  Returns:
    RoPE of `LOCAL` and `GLOBAL` layers.

  Raises:
    UserError: naming the kind or field that is missing or not supported.
  """
  given = hf.get("rope_parameters") or {}
  if not local_theta:
    if LOCAL in given or GLOBAL in given:
      raise UserError("config.json: rope_parameters by type of layer are not supported here")
    rope = _read(hf, hf.get("rope_scaling") or given, kinds, theta=hf.get("rope_theta", 1e4))
    return {LOCAL: rope, GLOBAL: rope}
  if set(given) - {LOCAL, GLOBAL}:
    raise UserError("config.json: rope_parameters must be given by type of layer")
  both = (given.get(GLOBAL) or {}) | (hf.get("rope_scaling") or {})
  theta = hf.get("rope_local_base_freq", 1e4)
  return {
    LOCAL: _read(hf, given.get(LOCAL) or {}, ("default",), theta=theta),
    GLOBAL: _read(hf, both, kinds, theta=hf.get("rope_theta", 1e6)),
  }


def _read(hf: dict[str, Any], fields: dict[str, Any], kinds, *, theta: float) -> Rope:
  theta = float(fields.get("rope_theta", theta))
  kind = choice("rope_type", fields.get("rope_type", fields.get("type", "default")), kinds)
  partial = fields.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1
  if partial != 1:
    raise UserError(f"config.json: partial_rotary_factor {partial} is not supported")

  def need(name: str) -> float:
    if fields.get(name) is None:
      raise UserError(f"config.json: RoPE of kind {kind!r} needs {name}")
    return float(fields[name])

  if kind == "default":
    return Rope(theta)
  factor = need("factor")
  if kind == "linear":
    return Rope(theta, kind, factor)
  length = hf.get("original_max_position_embeddings") or fields.get(
    "original_max_position_embeddings", hf.get("max_position_embeddings")
  )
  if length is None:
    raise UserError(f"config.json: RoPE of kind {kind!r} needs original_max_position_embeddings")
  if kind == "llama3":
    low, high = need("low_freq_factor"), need("high_freq_factor")
    return Rope(theta, kind, factor, length, low_freq_factor=low, high_freq_factor=high)
  return Rope(
    theta,
    kind,
    factor,
    length,
    beta_fast=float(fields.get("beta_fast") or 32),
    beta_slow=float(fields.get("beta_slow") or 1),
    truncate=fields.get("truncate", True),
    attention_factor=_yarn_attention_factor(fields, factor),
  )


def _yarn_attention_factor(fields: dict[str, Any], factor: float) -> float:
  given = fields.get("attention_factor")
  if given is not None:
    return float(given)
  stretch = lambda weight: 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
  if fields.get("mscale") and fields.get("mscale_all_dim"):
    return stretch(fields["mscale"]) / stretch(fields["mscale_all_dim"])
  return stretch(1)
