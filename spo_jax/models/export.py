"""Policies as Hugging Face checkpoints: a folder that `transformers` loads.

The names of the files, and which tensors there are, are those that `pretrained.py` reads.
"""

import itertools
import json
import math
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from spo_jax.errors import UserError
from spo_jax.infra import hosts
from spo_jax.models.decoder import DecoderConfig
from spo_jax.models.families import parameter_table, to_hf
from spo_jax.models.pretrained import (
  CONFIG_FILE,
  DTYPES,
  GENERATION_FILE,
  INDEX_FILE,
  WEIGHTS_FILE,
  Pretrained,
  at_path,
  check_tensors,
  tensor_layout,
)

SHARD_BYTES = 4 * 1024**3  # largest file of a checkpoint, unless one tensor is larger


def llama_config(cfg: DecoderConfig, context: int, tokenizer: Any) -> dict[str, Any]:
  """The config.json of a decoder that was not read from one: our own geometry is Llama's.

  Args:
    cfg: a decoder of the plain kind that `run.new_decoder` makes.
    context: most positions that it was trained at.
    tokenizer: whose special tokens `transformers` reads here when it generates.
  """
  (kind,) = cfg.layer_kinds
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.width,
    "num_hidden_layers": cfg.layers,
    "num_attention_heads": cfg.heads,
    "num_key_value_heads": cfg.kv_heads,
    "head_dim": cfg.head_dim,
    "intermediate_size": cfg.ffn,
    "hidden_act": "silu",
    "rms_norm_eps": cfg.norm_eps,
    "rope_parameters": {"rope_type": "default", "rope_theta": kind.rope.theta},
    "max_position_embeddings": context,
    "tie_word_embeddings": cfg.tie_embeddings,
    "dtype": "float32",
    **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
  }


def check_export(folder: pathlib.Path) -> None:
  """Checks that a checkpoint can be written to a folder.

  Raises:
    UserError: if something is there already, or the folder above cannot be written.
  """
  if folder.exists():
    raise UserError(f"--export: '{folder}' exists already; name a folder that does not")
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder.parent).close()
  except OSError as error:
    raise UserError(f"--export: '{folder}' cannot be written: {error.strerror}") from error


def export_model(
  params: Any,
  cfg: DecoderConfig,
  hf: dict[str, Any],
  tokenizer: Any,
  folder: pathlib.Path,
  *,
  source: Pretrained | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a folder that `transformers` loads: weights, config.json, tokenizer.

  Args:
    params: parameters of the decoder, on any devices of the run; the first process writes them.
    cfg: its geometry.
    hf: its config.json.
    tokenizer: its tokenizer; None writes none.
    folder: what to write; it appears when it is whole.
    source: the checkpoint that the parameters came from. Each tensor gets the dtype that it had
      there, and generation_config.json is kept.
    shard_bytes: largest file.

  Raises:
    UserError: as `check_export`.
  """
  dtypes = {}
  if source is not None:
    dtypes = {name: DTYPES[t.dtype] for name, t in check_tensors(source, cfg).items()}
  shards = _plan_shards(cfg, dtypes, shard_bytes)
  paths = {name: (path, kind) for path, (name, kind) in parameter_table(cfg).items()}
  fetch = lambda name: hosts.fetch(at_path(params, paths[name][0]))
  if not hosts.is_first():
    for name in itertools.chain(*shards.values()):
      fetch(name)
    return
  check_export(folder)
  unfinished = pathlib.Path(
    tempfile.mkdtemp(prefix=f"{folder.name}-incomplete-", dir=folder.parent)
  )
  try:
    for file, names in shards.items():
      tensors = {}
      for name in names:
        tensor = to_hf(paths[name][1], fetch(name))
        tensors[name] = np.ascontiguousarray(tensor, dtype=dtypes.get(name, "float32"))
      # transformers refuses files that do not say which framework's layout they have.
      save_file(tensors, unfinished / file, metadata={"format": "pt"})
    if len(shards) > 1:
      weight_map = {name: file for file, names in shards.items() for name in names}
      index = {"metadata": {}, "weight_map": weight_map}
      (unfinished / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    (unfinished / CONFIG_FILE).write_text(json.dumps(hf, indent=2) + "\n")
    if tokenizer is not None:
      tokenizer.save_pretrained(unfinished)
    if source is not None and (kept := source.folder / GENERATION_FILE).is_file():
      shutil.copy(kept, unfinished)
    # Temporary folders, and what safetensors writes, are their owner's alone.
    unfinished.chmod(0o755)
    for file in unfinished.iterdir():
      file.chmod(0o644)
    unfinished.rename(folder)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def _plan_shards(
  cfg: DecoderConfig, dtypes: dict[str, str], shard_bytes: int
) -> dict[str, list[str]]:
  """Names of the tensors of each file."""
  groups: list[list[str]] = [[]]
  used = 0
  for name, _, shape in tensor_layout(cfg):
    size = math.prod(shape) * (2 if dtypes.get(name, "float32") != "float32" else 4)
    if groups[-1] and used + size > shard_bytes:
      groups.append([])
      used = 0
    groups[-1].append(name)
    used += size
  if len(groups) == 1:
    return {WEIGHTS_FILE: groups[0]}
  name = lambda i: f"model-{i:05}-of-{len(groups):05}.safetensors"
  return {name(i): names for i, names in enumerate(groups, 1)}
