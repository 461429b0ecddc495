"""Tiny random models of `transformers` for every family, and their weights as our parameters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import linen as nn

from spo_jax.models.decoder import init_params
from spo_jax.models.families import config_from_hf, from_hf, parameter_table

VOCAB = 48

LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 5e5,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 128,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 1e4,
  "factor": 4.0,
  "original_max_position_embeddings": 64,
}
LOCAL_GLOBAL = {
  "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
  "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}

# name -> (model_type, fields). Windows are shorter than the tests' sequences, and caps so low that
# they bite.
CASES = {
  "llama": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
  "llama-3": (
    "llama",
    {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": LLAMA3},
  ),
  "mistral": ("mistral", {"sliding_window": 5}),
  "mistral-global": (
    "mistral",
    {"sliding_window": None, "head_dim": 16, "num_key_value_heads": 1},
  ),
  "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
  "qwen2-window": (
    "qwen2",
    {
      "use_sliding_window": True,
      "sliding_window": 4,
      "max_window_layers": 1,
      "rope_parameters": YARN,
    },
  ),
  "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
  "qwen3-window": (
    "qwen3",
    {
      "head_dim": 8,
      "use_sliding_window": True,
      "sliding_window": 3,
      "layer_types": ["sliding_attention", "full_attention"],
      "rope_parameters": YARN | {"attention_factor": 0.8},
    },
  ),
  "gemma2": (
    "gemma2",
    {
      "head_dim": 16,
      "sliding_window": 5,
      "query_pre_attn_scalar": 20,
      "attn_logit_softcapping": 2.0,
      "final_logit_softcapping": 0.7,
    },
  ),
  "gemma2-uncapped": (
    "gemma2",
    {
      "head_dim": 8,
      "num_key_value_heads": 1,
      "sliding_window": 3,
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
      "tie_word_embeddings": False,
    },
  ),
  "gemma3": (
    "gemma3_text",
    {
      "num_hidden_layers": 3,
      "head_dim": 16,
      "sliding_window": 4,
      "sliding_window_pattern": 3,
      "query_pre_attn_scalar": 12,
      "rope_parameters": LOCAL_GLOBAL,
    },
  ),
  "gemma3-capped": (
    "gemma3_text",
    {
      "head_dim": 8,
      "sliding_window": 6,
      "layer_types": ["full_attention", "sliding_attention"],
      "final_logit_softcapping": 0.5,
    },
  ),
}


def hf_model(model_type: str, fields: dict, seed: int = 0) -> transformers.PreTrainedModel:
  """A model with random weights, norms and biases among them, in float32."""
  common = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
  }
  config = transformers.AutoConfig.for_model(model_type, **(common | fields))
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      noise = torch.randn(weight.shape, generator=generator)
      if weight.ndim == 2:
        # Small embeddings: with large ones a tied model repeats its last token for ever.
        size = 0.4 if "embed" in name else 1.5
        weight.copy_(noise * size / weight.shape[1] ** 0.5)
      else:  # norms vary about the identity, biases about zero
        centre = 1.0 if "norm" in name and not model_type.startswith("gemma") else 0.0
        weight.copy_(centre + 0.3 * noise)
  return model.eval()


def config_json(model: transformers.PreTrainedModel) -> dict:
  """What config.json of the saved model holds."""
  return json.loads(model.config.to_json_string())


def our_params(cfg, tensors: dict[str, np.ndarray]):
  """Parameters of the decoder from tensors by their names in a checkpoint."""
  params = nn.unbox(jax.eval_shape(lambda: init_params(cfg, jax.random.key(0))))
  for path, (name, transform) in parameter_table(cfg).items():
    *above, last = path
    node = params
    for key in above:
      node = node[key]
    node[last] = jnp.asarray(from_hf(transform, tensors[name], node[last].shape))
  return params


def tensors_of(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
  """Tensors as a checkpoint has them: a tied unembedding is left out."""
  tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  if model.config.tie_word_embeddings:
    tensors.pop("lm_head.weight", None)
  return tensors


def both(model_type: str, fields: dict):
  """(the model of `transformers`, our config, our parameters) of the same weights."""
  model = hf_model(model_type, fields)
  cfg = config_from_hf(config_json(model))
  return model, cfg, our_params(cfg, tensors_of(model))


def hf_logits(model, tokens, mask=None, positions=None) -> np.ndarray:
  """[B, T] tokens -> [B, T, V] float32 logits; no window of position ids is guessed at."""
  tokens = torch.tensor(np.asarray(tokens)).long()
  mask = torch.ones_like(tokens) if mask is None else torch.tensor(mask).long()
  positions = None if positions is None else torch.tensor(positions).long()
  with torch.no_grad():
    logits = model(
      input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
  return logits.float().numpy()
