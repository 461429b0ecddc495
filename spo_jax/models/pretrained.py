"""Hugging Face checkpoints: found, checked, and read tensor by tensor into sharded arrays.

A checkpoint is a folder with `config.json` and `model.safetensors`, or several such files and their
index. Names, shapes and dtypes are checked from the files' headers, before a tensor is read.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import safetensors
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.errors import UserError
from spo_jax.infra.mesh import param_shardings
from spo_jax.models.decoder import DecoderConfig, init_params
from spo_jax.models.families import Transform, from_hf, hf_shape, parameter_table

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # by their safetensors names

# Of a model on the hub: what is read here, and what its tokenizer may be made of.
_TOKENIZER_FILES = ("*token*", "*.model", "chat_template*", "vocab.json", "merges.txt")
_FILES = (CONFIG_FILE, GENERATION_FILE, INDEX_FILE, "*.safetensors", *_TOKENIZER_FILES)
_NAMED = 3  # most tensors that an error names


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A checkpoint on disk."""

  folder: pathlib.Path
  hf: dict[str, Any]  # config.json

  @property
  def vocab_size(self) -> int:
    """Rows of the embedding; more than the tokenizer's tokens where it was padded."""
    return self.hf["vocab_size"]


def find_pretrained(name: str) -> Pretrained:
  """The checkpoint of a folder, or of a hub id, which is downloaded.

  Raises:
    UserError: if there is none, or its config.json cannot be read.
  """
  folder = pathlib.Path(name).expanduser()
  if not folder.is_dir():
    folder = _download(name)
  try:
    hf = json.loads((folder / CONFIG_FILE).read_text())
  except OSError as error:
    raise UserError(f"model folder '{folder}' has no {CONFIG_FILE}") from error
  except ValueError as error:
    raise UserError(f"'{folder / CONFIG_FILE}' is no JSON: {error}") from error
  return Pretrained(folder, hf)


def _download(name: str) -> pathlib.Path:
  import huggingface_hub

  try:
    return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
  except Exception as error:  # of the network, of the hub, or of a name that no hub could have
    reason = " ".join(str(error).split())[:160]
    raise UserError(
      f"config.model '{name}' is no folder, and could not be had from the hub ({reason})"
    ) from error


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """Where a tensor lies, and what its file's header tells of it."""

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: str  # as safetensors names it


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  index = folder / INDEX_FILE
  if index.is_file():
    try:
      names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f"'{index}' is no index of a checkpoint: {error!r}") from error
  else:
    names = [WEIGHTS_FILE]
  files = [folder / name for name in names]
  for file in files:
    if not file.is_file():
      raise UserError(f"model folder '{folder}' has no {file.name}")
  return files


@contextlib.contextmanager
def _open(file: pathlib.Path):
  try:
    with safetensors.safe_open(file, framework="np") as opened:
      yield opened
  except safetensors.SafetensorError as error:
    raise UserError(f"'{file}' is damaged or no safetensors file: {error}") from error


def _headers(folder: pathlib.Path) -> dict[str, _Tensor]:
  tensors = {}
  for file in _files(folder):
    with _open(file) as opened:
      for name in opened.keys():  # noqa: SIM118 - not a dictionary
        entry = opened.get_slice(name)
        tensors[name] = _Tensor(file, tuple(entry.get_shape()), entry.get_dtype())
  return tensors


def check_tensors(pretrained: Pretrained, cfg: DecoderConfig) -> dict[str, _Tensor]:
  """Checks that a checkpoint has the tensors of a decoder, no more and no less, in their shapes.

  Args:
    pretrained: the checkpoint.
    cfg: the decoder that its config.json describes.

  Returns:
    The tensors by name.

  Raises:
    UserError: naming the tensors that are missing, surplus, misshapen or of an unknown dtype.
  """
  found = _headers(pretrained.folder)
  wanted = {name: hf_shape(kind, shape) for name, kind, shape in tensor_layout(cfg)}
  ignored = lambda name: (
    name.endswith("rotary_emb.inv_freq") or (cfg.tie_embeddings and name == "lm_head.weight")
  )
  problems = {
    "lacks": [name for name in wanted if name not in found],
    "has, which its config.json does not account for,": [
      name for name in found if name not in wanted and not ignored(name)
    ],
    "has in another shape": [
      f"{name} {list(found[name].shape)} (not {list(shape)})"
      for name, shape in wanted.items()
      if name in found and found[name].shape != shape
    ],
    f"has in another dtype than {', '.join(DTYPES)}": [
      f"{name} {found[name].dtype}"
      for name in wanted
      if name in found and found[name].dtype not in DTYPES
    ],
  }
  for problem, names in problems.items():
    if names:
      more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
      listed = ", ".join(names[:_NAMED])
      raise UserError(f"checkpoint '{pretrained.folder}' {problem} {listed}{more}")
  return {name: found[name] for name in wanted}


def _shapes(cfg: DecoderConfig):
  return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def tensor_layout(cfg: DecoderConfig) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
  """(name of the tensor, its transform, shape of the parameter), in the order of the layers."""
  shapes = nn.unbox(_shapes(cfg))
  for path, (name, kind) in parameter_table(cfg).items():
    yield name, kind, at_path(shapes, path).shape


def at_path(tree, path: tuple[str, ...]):
  """What a nested dictionary holds at the end of a path of keys."""
  for name in path:
    tree = tree[name]
  return tree


def load_params(pretrained: Pretrained, cfg: DecoderConfig, mesh: jax.sharding.Mesh):
  """Parameters of a checkpoint, float32, each placed where the mesh wants it.

  One tensor is in host memory at a time, the largest first, when the devices hold least.

  Args:
    pretrained: the checkpoint.
    cfg: the decoder that its config.json describes.
    mesh: devices.

  Raises:
    UserError: as `check_tensors`.
  """
  tensors = check_tensors(pretrained, cfg)
  shapes = _shapes(cfg)
  shardings, shapes = param_shardings(mesh, shapes), nn.unbox(shapes)
  table = parameter_table(cfg)
  size = lambda item: -math.prod(tensors[item[1][0]].shape)
  params: dict[str, Any] = {}
  for path, (name, kind) in sorted(table.items(), key=size):
    # Opened anew for each tensor: a file that stays open keeps what was read in memory.
    with _open(tensors[name].file) as opened:
      tensor = opened.get_tensor(name)
    sharding = at_path(shardings, path)
    raw = jax.make_array_from_callback(
      tensor.shape, hf_sharding(kind, sharding), lambda index, tensor=tensor: tensor[index]
    )
    array = raw  # what is stored as it is kept, such as a large embedding, is not copied again
    if kind is not Transform.SAME or raw.dtype != np.float32:
      array = _to_param(kind, at_path(shapes, path).shape, sharding)(raw)
    node = params
    for step in path[:-1]:
      node = node.setdefault(step, {})
    node[path[-1]] = jax.block_until_ready(array)
  return params


@functools.cache
def _to_param(kind: Transform, shape: tuple[int, ...], sharding: NamedSharding):
  """Compiled: a tensor on the devices to its parameter. Transposing is slow on a host."""
  return jax.jit(
    lambda tensor: from_hf(kind, tensor, shape).astype("float32"), out_shardings=sharding
  )


def hf_sharding(kind: Transform, sharding: NamedSharding) -> NamedSharding:
  """Where the parts of a tensor go whose parameter is split as given; heads are split, not Dh."""
  spec = (*sharding.spec, *[None] * 3)
  axes = {
    Transform.SAME: range(len(sharding.spec)),
    Transform.TRANSPOSED: (1, 0),
    Transform.TO_HEADS: (1, 0),
    Transform.FROM_HEADS: (2, 0),
    Transform.BIAS: (0,),
  }[kind]
  return NamedSharding(sharding.mesh, PartitionSpec(*[spec[axis] for axis in axes]))
