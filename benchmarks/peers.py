"""Other people's samplers on a checkpoint in Hugging Face format, where they are installed; what
trains is in `peer_trainers.py`.

A peer is called with prompts [R, P], n, S and a seed, and draws n continuations of S tokens for
each prompt: [R, n, S], at temperature 1, from the whole vocabulary, none of which ends early.
"""

import contextlib
import importlib.util
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from benchmarks.random_model import model_config
from spo_jax.models.decoder import DecoderConfig, init_params
from spo_jax.models.export import export_model
from spo_jax.models.families import config_from_hf

Peer = Callable[[np.ndarray, int, int, int], np.ndarray]


class Model(NamedTuple):
  """Weights that all engines of a benchmark share."""

  hf: dict[str, Any]  # config.json
  cfg: DecoderConfig
  params: Any


def random_model(layers: int, width: int, vocab: int) -> Model:
  """A random Qwen2 model.

  Raises:
    UserError: if the width cannot be divided into heads.
  """
  hf = model_config("qwen2", layers, width, vocab)
  cfg = config_from_hf(hf)
  params = jax.jit(lambda key: nn.unbox(init_params(cfg, key)))(jax.random.key(0))
  return Model(hf, cfg, params)


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

    transformer = tunix_model(folder)
    config = transformer.config
    cache = sampler.CacheConfig(
      cache_size=context,
      num_layers=config.num_layers,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
    )
    self._sampler = sampler.Sampler(transformer, Numbers(config.vocab_size), cache)

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


def tunix_model(folder: pathlib.Path, mesh: jax.sharding.Mesh | None = None):
  """The checkpoint as a Qwen2 of tunix, float32."""
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
  return params.create_model_from_safe_tensors(str(folder), config, mesh)


class Numbers:
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


def installed(names: Sequence[str]) -> list[str]:
  """Those of the peers that are installed; of the others a word on stderr."""
  found = []
  for name in names:
    if gone := missing(name):
      print(f"{name} is left out: {', '.join(gone)} is not installed", file=sys.stderr)
    else:
      found.append(name)
  return found


@contextlib.contextmanager
def checkpoint(model: Model) -> Iterator[pathlib.Path]:
  """The model in a folder in Hugging Face format, which goes when the block ends."""
  with tempfile.TemporaryDirectory(prefix="spo_jax_benchmark_") as folder:
    path = pathlib.Path(folder) / "model"
    export_model(model.params, model.cfg, model.hf, None, path)
    yield path


def load(
  makers: Mapping[str, Callable[..., Any]], names: Sequence[str], model: Model, *args
) -> dict[str, Any]:
  """What is made of the peers that are installed, by name: maker(folder of the model, *args)."""
  with checkpoint(model) as folder:
    return {name: makers[name](folder, *args) for name in installed(names)}
