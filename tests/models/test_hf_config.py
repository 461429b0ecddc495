"""Reading config.json: published ones of both styles, and what is refused."""

import json

import pytest
import transformers

from spo_jax.errors import UserError
from spo_jax.models.decoder import DecoderConfig, LayerKind
from spo_jax.models.families import config_from_hf
from spo_jax.models.rope import Rope

LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_size": 2048,
  "intermediate_size": 5632,
  "max_position_embeddings": 2048,
  "num_attention_heads": 32,
  "num_hidden_layers": 22,
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-5,
  "rope_scaling": None,
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
  "vocab_size": 32000,
}
QWEN2 = LLAMA | {
  "architectures": ["Qwen2ForCausalLM"],
  "model_type": "qwen2",
  "hidden_size": 1536,
  "num_attention_heads": 12,
  "num_key_value_heads": 2,
  "max_window_layers": 20,
  "sliding_window": 4096,
  "use_sliding_window": False,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
GEMMA2 = {
  "architectures": ["Gemma2ForCausalLM"],
  "model_type": "gemma2",
  "attn_logit_softcapping": 50.0,
  "final_logit_softcapping": 30.0,
  "head_dim": 256,
  "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "max_position_embeddings": 8192,
  "num_attention_heads": 8,
  "num_hidden_layers": 26,
  "num_key_value_heads": 4,
  "query_pre_attn_scalar": 224,
  "rope_theta": 10000.0,
  "sliding_window": 4096,
  "vocab_size": 256000,
}
GEMMA3 = GEMMA2 | {
  "architectures": ["Gemma3ForCausalLM"],
  "model_type": "gemma3_text",
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
  "rope_local_base_freq": 20000,
  "rope_theta": 1000000,
  "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
  "sliding_window": 512,
  "sliding_window_pattern": 6,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 32.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 1024,
}

# In the style of the hub, as transformers 4 wrote them.
PUBLISHED = {
  "llama": LLAMA,
  "llama-3": LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 5e5, "tie_word_embeddings": True},
  "llama-linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
  "mistral": MISTRAL | {"sliding_window": 4096},
  "mistral-global": MISTRAL | {"sliding_window": None, "head_dim": 128, "rope_theta": 1e6},
  "qwen2": QWEN2,
  "qwen2-window": QWEN2 | {"use_sliding_window": True, "rope_scaling": YARN},
  "qwen3": QWEN3 | {"head_dim": 128},
  "gemma2": GEMMA2,
  "gemma3": GEMMA3,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_old_and_new_style_give_one_decoder(name):
  """`transformers` reads the old style and writes the new one."""
  old = PUBLISHED[name]
  new = transformers.AutoConfig.for_model(**old).to_json_string()
  assert config_from_hf(json.loads(new)) == config_from_hf(old)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_defaults_are_those_of_transformers(name):
  """Of a config.json that leaves out all but sizes."""
  sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
  known = ("model_type", "vocab_size", "num_key_value_heads", "max_position_embeddings", *sizes)
  short = {field: PUBLISHED[name][field] for field in known}
  whole = json.loads(transformers.AutoConfig.for_model(**short).to_json_string())
  assert config_from_hf(whole) == config_from_hf(short)


def test_fields_of_llama():
  assert config_from_hf(LLAMA, dtype="bfloat16", remat="dots") == DecoderConfig(
    vocab_size=32000,
    width=2048,
    layers=22,
    heads=32,
    kv_heads=4,
    head_dim=64,
    ffn=5632,
    layer_kinds=(LayerKind(Rope(1e4)),) * 22,
    norm_eps=1e-5,
    tie_embeddings=False,
    dtype="bfloat16",
    remat="dots",
  )


def test_layers_of_each_family():
  windows = lambda name: [kind.window for kind in config_from_hf(PUBLISHED[name]).layer_kinds]
  assert windows("mistral") == [4096] * 22 and windows("mistral-global") == [None] * 22
  assert windows("qwen2") == [None] * 22
  assert windows("qwen2-window") == [None] * 20 + [4096] * 2
  assert windows("gemma2") == [4096, None] * 13
  assert windows("gemma3") == ([512] * 5 + [None]) * 4 + [512] * 2
  local, far = config_from_hf(GEMMA3).layer_kinds[4:6]
  assert local.rope == Rope(2e4) and far.rope == Rope(1e6, "linear", 8.0)


REFUSED = {
  "model_type 'mixtral' is not supported": LLAMA | {"model_type": "mixtral"},
  "model_type None": {},
  "architecture 'LlamaForSequenceClassification'": LLAMA
  | {"architectures": ["LlamaForSequenceClassification"]},
  "is_causal False is not": LLAMA | {"is_causal": False},
  "attention_bias True is not": LLAMA | {"attention_bias": True},
  "mlp_bias True is not": LLAMA | {"mlp_bias": True},
  "num_local_experts 8 is not": LLAMA | {"num_local_experts": 8},
  "hidden_size is None, it must be": {k: v for k, v in LLAMA.items() if k != "hidden_size"},
  "vocab_size is '32000'": LLAMA | {"vocab_size": "32000"},
  "32 must be a multiple of num_key_value_heads 5": LLAMA | {"num_key_value_heads": 5},
  "head_dim 65 must be even": LLAMA | {"head_dim": 65},
  "hidden_act 'relu' is not supported, only silu": LLAMA | {"hidden_act": "relu"},
  "rope_type 'dynamic' is not supported, only default, linear, llama3, yarn": LLAMA
  | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
  "'linear' needs factor": LLAMA | {"rope_scaling": {"type": "linear"}},
  "'llama3' needs low_freq_factor": LLAMA | {"rope_scaling": {"type": "llama3", "factor": 2.0}},
  "'yarn' needs original_max_position_embeddings": {
    **{k: v for k, v in LLAMA.items() if k != "max_position_embeddings"},
    "rope_scaling": {"type": "yarn", "factor": 2.0},
  },
  "partial_rotary_factor 0.5": LLAMA | {"partial_rotary_factor": 0.5},
  "by type of layer are not supported": LLAMA | {"rope_parameters": {"full_attention": {}}},
  "must be given by type of layer": GEMMA3 | {"rope_parameters": {"rope_type": "default"}},
  "rope_type 'yarn' is not supported, only default, linear$": GEMMA3 | {"rope_scaling": YARN},
  "attn_logit_softcapping is not supported": GEMMA3 | {"attn_logit_softcapping": 50.0},
  "layer_types are not supported for mistral": MISTRAL | {"layer_types": ["full_attention"] * 22},
  "1 layer_types for 22 layers": QWEN2 | {"layer_types": ["full_attention"]},
  "layer_types 'chunked_attention'": QWEN2 | {"layer_types": ["chunked_attention"] * 22},
  "no sliding_window": QWEN2 | {"layer_types": ["sliding_attention"] * 22},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_decoder_does_not_have_is_named(message):
  with pytest.raises(UserError, match=message) as error:
    config_from_hf(REFUSED[message])
  assert "\n" not in str(error.value)
