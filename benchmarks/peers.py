"""Other people's samplers on a checkpoint in Hugging Face format, where they are installed.

A peer is called with prompts [R, P], n, S and a seed, and draws n continuations of S tokens for
each prompt: [R, n, S], at temperature 1, from the whole vocabulary, none of which ends early.
"""

import importlib.util
import json
import pathlib
from collections.abc import Callable

import numpy as np

Peer = Callable[[np.ndarray, int, int, int], np.ndarray]


class HuggingFace:
  """`generate` of transformers, on PyTorch: the keys and values of a prompt are copied n times."""

  needs = ("torch", "transformers")

  def __init__(self, folder: pathlib.Path, context: int):
    import torch
    import transformers

    del context  # its cache grows
    self._torch, self._transformers = torch, transformers
    self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    self._model.eval()

  def __call__(self, prompts: np.ndarray, n: int, new_tokens: int, seed: int) -> np.ndarray:
    self._torch.manual_seed(seed)
    tokens = self._torch.from_numpy(prompts.astype(np.int64))
    settings = self._transformers.GenerationConfig(
      do_sample=True,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      num_return_sequences=n,
      max_new_tokens=new_tokens,
      eos_token_id=None,
      pad_token_id=0,
    )
    with self._torch.inference_mode():
      drawn = self._model.generate(
        tokens, attention_mask=self._torch.ones_like(tokens), generation_config=settings
      )
    return drawn[:, prompts.shape[1] :].numpy().reshape(len(prompts), n, new_tokens)


class Tunix:
  """google-tunix's own Sampler: every continuation prefills its prompt anew."""

  needs = ("tunix",)

  def __init__(self, folder: pathlib.Path, context: int):
    from tunix.generate import sampler
    from tunix.models.qwen2 import model, params

    hf = json.loads((pathlib.Path(folder) / "config.json").read_text())
    config = model.ModelConfig(
      num_layers=hf["num_hidden_layers"],
      vocab_size=hf["vocab_size"],
      embed_dim=hf["hidden_size"],
      hidden_dim=hf["intermediate_size"],
      num_heads=hf["num_attention_heads"],
      head_dim=hf["head_dim"],
      num_kv_heads=hf["num_key_value_heads"],
      rope_theta=hf["rope_parameters"]["rope_theta"],
      norm_eps=hf["rms_norm_eps"],
      use_tied_embedding=hf["tie_word_embeddings"],
    )
    cache = sampler.CacheConfig(
      cache_size=context,
      num_layers=config.num_layers,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
    )
    transformer = params.create_model_from_safe_tensors(str(folder), config)
    self._sampler = sampler.Sampler(transformer, _Numbers(config.vocab_size), cache)

  def __call__(self, prompts: np.ndarray, n: int, new_tokens: int, seed: int) -> np.ndarray:
    texts = [" ".join(map(str, row)) for row in np.repeat(prompts, n, axis=0)]
    drawn = self._sampler(
      texts,
      max_generation_steps=new_tokens,
      max_prompt_length=prompts.shape[1],
      temperature=1.0,
      top_p=1.0,
      seed=seed,
    )
    return np.stack(drawn.tokens).reshape(len(prompts), n, new_tokens)


class _Numbers:
  """A tokenizer of texts such as `17 4 256`; padding and the end are not in the vocabulary."""

  def __init__(self, vocab_size: int):
    self._outside = vocab_size

  def encode(self, text: str, **_) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: list[int], **_) -> str:
    return " ".join(map(str, ids))

  def bos_id(self) -> None:
    return None

  def eos_id(self) -> int:
    return self._outside

  def pad_id(self) -> int:
    return self._outside


PEERS = {"hf": HuggingFace, "tunix": Tunix}


def missing(name: str) -> list[str]:
  """Packages that a peer needs and that are not installed."""
  return [package for package in PEERS[name].needs if importlib.util.find_spec(package) is None]
