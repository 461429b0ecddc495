"""From a Hugging Face `config.json` to a `DecoderConfig`, and from our parameters to its tensors.

What `transformers` would compute otherwise than our decoder is refused here, by name, before
anything is built. Defaults are those of `transformers` for fields that config.json leaves out.
"""

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from spo_jax.errors import UserError
from spo_jax.models.decoder import DecoderConfig, LayerKind, block_name
from spo_jax.models.hf_rope import GLOBAL, LOCAL, choice, read_ropes


def _always_global(hf: dict[str, Any], layers: int) -> list[str]:
  return [GLOBAL] * layers


def _mistral_types(hf: dict[str, Any], layers: int) -> list[str]:
  return [GLOBAL if hf.get("sliding_window", 4096) is None else LOCAL] * layers


def _qwen_types(hf: dict[str, Any], layers: int) -> list[str]:
  first_local = hf.get("max_window_layers", 28) if hf.get("use_sliding_window") else layers
  return [LOCAL if layer >= first_local else GLOBAL for layer in range(layers)]


def _gemma2_types(hf: dict[str, Any], layers: int) -> list[str]:
  return [GLOBAL if layer % 2 else LOCAL for layer in range(layers)]


def _gemma3_types(hf: dict[str, Any], layers: int) -> list[str]:
  pattern = hf.get("sliding_window_pattern", 6)
  return [LOCAL if (layer + 1) % pattern else GLOBAL for layer in range(layers)]


@dataclasses.dataclass(frozen=True)
class Family:
  """What a `model_type` implies."""

  architecture: str  # class of `transformers` whose weights are read
  layer_types: Callable[[dict[str, Any], int], list[str]]  # where config.json has no `layer_types`
  tied: bool = False  # default of tie_word_embeddings
  head_dim: int | None = None  # default; None is width / heads
  qkv_bias: bool = False
  qk_norm: bool = False
  gemma: bool = False  # post norms, (1 + scale) norms, scaled embeddings and queries, GeGLU
  caps: tuple[float | None, float | None] = (None, None)  # defaults, of attention and of logits
  ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
  local_theta: bool = False  # local layers have a RoPE of their own, which is not scaled


FAMILIES = {
  "llama": Family("LlamaForCausalLM", _always_global),
  "mistral": Family("MistralForCausalLM", _mistral_types),
  "qwen2": Family("Qwen2ForCausalLM", _qwen_types, qkv_bias=True),
  "qwen3": Family("Qwen3ForCausalLM", _qwen_types, head_dim=128, qk_norm=True),
  "gemma2": Family(
    "Gemma2ForCausalLM", _gemma2_types, tied=True, head_dim=256, gemma=True, caps=(50.0, 30.0)
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    _gemma3_types,
    tied=True,
    head_dim=256,
    qk_norm=True,
    gemma=True,
    ropes=("default", "linear"),
    local_theta=True,
  ),
}

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# Fields which, if set, change the computation to one that the decoder does not have.
UNSUPPORTED = (
  "attention_bias",
  "mlp_bias",
  "use_bidirectional_attention",
  "quantization_config",
  "num_experts",
  "num_local_experts",
)


def config_from_hf(
  hf: dict[str, Any],
  *,
  dtype: str = "float32",
  remat: str = "none",
  attention: str = "blocks",
  scan_layers: bool = False,
) -> DecoderConfig:
  """The decoder that a Hugging Face config describes.

  Args:
    hf: the contents of config.json, as any version of `transformers` writes it.
    dtype: of activations and matmuls.
    remat: what is recomputed in the backward pass, of decoder.REMATS.
    attention: who computes it, of attention.BACKENDS.
    scan_layers: whether layers without a cache are a loop.

  Returns:
    The config of the decoder.

  Raises:
    UserError: naming an architecture or a field that is not supported, is missing or does not fit.
  """
  model_type = choice("model_type", hf.get("model_type"), FAMILIES)
  family = FAMILIES[model_type]
  for architecture in hf.get("architectures") or ():
    choice("architecture", architecture, (family.architecture,))
  if not hf.get("is_causal", True):
    raise UserError("config.json: is_causal False is not supported")
  for name in UNSUPPORTED:
    if hf.get(name):
      raise UserError(f"config.json: {name} {hf[name]!r} is not supported")

  width, layers = _size(hf, "hidden_size"), _size(hf, "num_hidden_layers")
  heads = _size(hf, "num_attention_heads")
  kv_heads = hf.get("num_key_value_heads") or heads
  head_dim = hf.get("head_dim", family.head_dim) or width // heads
  if heads % kv_heads:
    raise UserError(
      f"config.json: num_attention_heads {heads} must be a multiple of num_key_value_heads "
      f"{kv_heads}"
    )
  if head_dim % 2:
    raise UserError(f"config.json: head_dim {head_dim} must be even (RoPE)")
  attention_cap = hf.get("attn_logit_softcapping", family.caps[0])
  if model_type == "gemma3_text" and attention_cap is not None:
    raise UserError("config.json: attn_logit_softcapping is not supported for gemma3_text")
  activation = ("hidden_act", "silu")
  gemma = {}
  if family.gemma:
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    gemma = {
      "post_norms": True,
      "unit_offset_norms": True,
      "embedding_scale": width**0.5,
      "query_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
      "attention_cap": attention_cap,
      "logit_cap": hf.get("final_logit_softcapping", family.caps[1]),
    }
  return DecoderConfig(
    vocab_size=_size(hf, "vocab_size"),
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    ffn=_size(hf, "intermediate_size"),
    layer_kinds=_layer_kinds(hf, family, layers),
    norm_eps=hf.get("rms_norm_eps", 1e-6),
    tie_embeddings=hf.get("tie_word_embeddings", family.tied),
    dtype=dtype,
    remat=remat,
    activation=ACTIVATIONS[choice(activation[0], hf.get(*activation), ACTIVATIONS)],
    qkv_bias=family.qkv_bias,
    qk_norm=family.qk_norm,
    attention=attention,
    scan_layers=scan_layers,
    **gemma,
  )


def _size(hf: dict[str, Any], name: str) -> int:
  value = hf.get(name)
  if type(value) is not int or value < 1:
    raise UserError(f"config.json: {name} is {value!r}, it must be a positive whole number")
  return value


def _layer_kinds(hf: dict[str, Any], family: Family, layers: int) -> tuple[LayerKind, ...]:
  types = hf.get("layer_types")
  if types is None:
    types = family.layer_types(hf, layers)
  elif hf["model_type"] in ("llama", "mistral"):
    raise UserError(f"config.json: layer_types are not supported for {hf['model_type']}")
  if len(types) != layers:
    raise UserError(f"config.json: {len(types)} layer_types for {layers} layers")
  window = hf.get("sliding_window", 4096)
  if family.layer_types is _qwen_types and not hf.get("use_sliding_window"):
    window = None
  for kind in types:
    choice("layer_types", kind, (LOCAL, GLOBAL))
  if LOCAL in types and not window:
    raise UserError("config.json: layers with sliding attention, and no sliding_window")
  ropes = read_ropes(hf, family.ropes, local_theta=family.local_theta)
  kinds = {GLOBAL: LayerKind(ropes[GLOBAL]), LOCAL: LayerKind(ropes[LOCAL], window)}
  return tuple(kinds[kind] for kind in types)


class Transform(enum.Enum):
  """How a tensor of `transformers` becomes our parameter; see `from_hf` and `to_hf`."""

  SAME = "same"
  TRANSPOSED = "transposed"  # [out, in] -> [in, out]
  TO_HEADS = "transposed, output split into heads"  # [H * Dh, D] -> [D, H, Dh]
  FROM_HEADS = "transposed, input split into heads"  # [D, H * Dh] -> [H, Dh, D]
  BIAS = "split into heads"  # [H * Dh] -> [H, Dh]


_INPUT_AXES = {Transform.TRANSPOSED: 1, Transform.TO_HEADS: 1, Transform.FROM_HEADS: 2}


def hf_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the tensor whose parameter has the given shape."""
  if transform is Transform.SAME:
    return tuple(shape)
  if transform is Transform.BIAS:
    return (math.prod(shape),)
  inputs = _INPUT_AXES[transform]
  return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def from_hf(transform: Transform, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The parameter [*shape] of a tensor of shape `hf_shape(transform, shape)`; any dtype."""
  return tensor if transform is Transform.SAME else tensor.T.reshape(shape)


def to_hf(transform: Transform, param: np.ndarray) -> np.ndarray:
  """The inverse of `from_hf`."""
  if transform is Transform.SAME:
    return param
  return param.reshape(hf_shape(transform, param.shape)[::-1]).T


def parameter_table(cfg: DecoderConfig) -> dict[tuple[str, ...], tuple[str, Transform]]:
  """For the path of each parameter, the name of its tensor in a checkpoint and how it is laid out.

  A tied unembedding is the embedding, and has no entry.
  """
  names = {
    ("attention_norm", "scale"): ("input_layernorm.weight", Transform.SAME),
    ("query",): ("self_attn.q_proj.weight", Transform.TO_HEADS),
    ("key",): ("self_attn.k_proj.weight", Transform.TO_HEADS),
    ("value",): ("self_attn.v_proj.weight", Transform.TO_HEADS),
    ("out",): ("self_attn.o_proj.weight", Transform.FROM_HEADS),
    ("mlp_norm", "scale"): ("post_attention_layernorm.weight", Transform.SAME),
    ("gate",): ("mlp.gate_proj.weight", Transform.TRANSPOSED),
    ("up",): ("mlp.up_proj.weight", Transform.TRANSPOSED),
    ("down",): ("mlp.down_proj.weight", Transform.TRANSPOSED),
  }
  if cfg.qkv_bias:
    names[("query_bias",)] = ("self_attn.q_proj.bias", Transform.BIAS)
    names[("key_bias",)] = ("self_attn.k_proj.bias", Transform.BIAS)
    names[("value_bias",)] = ("self_attn.v_proj.bias", Transform.BIAS)
  if cfg.qk_norm:
    names[("query_norm", "scale")] = ("self_attn.q_norm.weight", Transform.SAME)
    names[("key_norm", "scale")] = ("self_attn.k_norm.weight", Transform.SAME)
  if cfg.post_norms:
    names[("attention_post_norm", "scale")] = ("post_attention_layernorm.weight", Transform.SAME)
    names[("mlp_norm", "scale")] = ("pre_feedforward_layernorm.weight", Transform.SAME)
    names[("mlp_post_norm", "scale")] = ("post_feedforward_layernorm.weight", Transform.SAME)
  table = {
    ("embedding",): ("model.embed_tokens.weight", Transform.SAME),
    ("final_norm", "scale"): ("model.norm.weight", Transform.SAME),
  }
  if not cfg.tie_embeddings:
    table[("unembedding",)] = ("lm_head.weight", Transform.TRANSPOSED)
  for layer in range(cfg.layers):
    for path, (name, transform) in names.items():
      table[(block_name(layer), *path)] = (f"model.layers.{layer}.{name}", transform)
  return table
