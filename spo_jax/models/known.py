"""The config.json of the paper's models, as far as it fixes their shapes: plans need no download.

Each is copied from the model's page on the Hugging Face hub, or from the page that is named.
"""

from typing import Any

_LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "rope_theta": 10000.0}
_QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "vocab_size": 151936}

# realtreetune/rho-1b-sft-MATH; that of rho-1b-sft-GSM8K is taken to be the same, its weights are of
# the same size. No token was added to TinyLlama's 32000.
_RHO = _LLAMA | {
  "hidden_size": 2048,
  "intermediate_size": 5632,
  "max_position_embeddings": 2048,
  "num_attention_heads": 32,
  "num_hidden_layers": 22,
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-5,
  "vocab_size": 32000,
}

# deepseek-ai/deepseek-math-7b-base; the fine-tuned models are taken to be the same.
_DEEPSEEK_MATH = _LLAMA | {
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "max_position_embeddings": 4096,
  "num_attention_heads": 32,
  "num_hidden_layers": 30,
  "num_key_value_heads": 32,
  "rms_norm_eps": 1e-6,
  "vocab_size": 102400,
}

_QWEN_1_5B = _QWEN | {
  "hidden_size": 1536,
  "intermediate_size": 8960,
  "num_attention_heads": 12,
  "num_hidden_layers": 28,
  "num_key_value_heads": 2,
}

_QWEN_7B = _QWEN | {
  "hidden_size": 3584,
  "intermediate_size": 18944,
  "num_attention_heads": 28,
  "num_hidden_layers": 28,
  "num_key_value_heads": 4,
  "vocab_size": 152064,
}

_QWEN_0_5B = _QWEN | {
  "hidden_size": 896,
  "intermediate_size": 4864,
  "num_attention_heads": 14,
  "num_hidden_layers": 24,
  "num_key_value_heads": 2,
}

KNOWN_MODELS: dict[str, dict[str, Any]] = {
  "realtreetune/rho-1b-sft-GSM8K": _RHO,
  "realtreetune/rho-1b-sft-MATH": _RHO,
  "realtreetune/deepseekmath-7b-sft-GSM8K": _DEEPSEEK_MATH,
  "realtreetune/deepseekmath-7b-sft-MATH-v2": _DEEPSEEK_MATH,
  # As its derivatives bluryar/DeepSeek-R1-Distill-Qwen-1.5B-sft and rohinm/model have it.
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN_1_5B
  | {"max_position_embeddings": 131072, "rope_theta": 10000, "tie_word_embeddings": False},
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN_7B
  | {"max_position_embeddings": 131072, "rope_theta": 10000, "tie_word_embeddings": False},
  # As nbeerbower/Dumpling-Qwen2.5-1.5B and OrangeEye/qwen-25-1.5b-base-sft have it.
  "Qwen/Qwen2.5-1.5B": _QWEN_1_5B
  | {"max_position_embeddings": 131072, "rope_theta": 1e6, "tie_word_embeddings": True},
  # As its copy unsloth/Qwen2.5-0.5B-Instruct has it.
  "Qwen/Qwen2.5-0.5B-Instruct": _QWEN_0_5B
  | {"max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": True},
}
