"""Hugging Face checkpoints: read tensor by tensor into sharded arrays, and written back.

A checkpoint is a folder with `config.json` and `model.safetensors`, or several such files and their
index. Names, shapes and dtypes are checked from the files' headers, before a tensor is read.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import safetensors
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from spo_jax.errors import UserError
from spo_jax.infra.mesh import param_shardings
from spo_jax.models.decoder import DecoderConfig, init_params
from spo_jax.models.families import Transform, from_hf, hf_shape, parameter_table, to_hf

SHARD_BYTES = 4 * 1024**3  # largest file of an exported checkpoint, unless one tensor is larger

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FILES = (_CONFIG, _INDEX, "*.safetensors", "generation_config.json", "*token*", "*.model")
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
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
    hf = json.loads((folder / _CONFIG).read_text())
  except OSError as error:
    raise UserError(f"model folder '{folder}' has no {_CONFIG}") from error
  except ValueError as error:
    raise UserError(f"'{folder / _CONFIG}' is no JSON: {error}") from error
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
  index = folder / _INDEX
  if index.is_file():
    try:
      names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f"'{index}' is no index of a checkpoint: {error!r}") from error
  else:
    names = [_WEIGHTS]
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
  wanted = {name: hf_shape(kind, shape) for name, kind, shape in _layout(cfg)}
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
    f"has in another dtype than {', '.join(_DTYPES)}": [
      f"{name} {found[name].dtype}"
      for name in wanted
      if name in found and found[name].dtype not in _DTYPES
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


def _layout(cfg: DecoderConfig) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
  """(name of the tensor, its transform, shape of the parameter), in the order of the layers."""
  shapes = nn.unbox(_shapes(cfg))
  for path, (name, kind) in parameter_table(cfg).items():
    yield name, kind, _at(shapes, path).shape


def _at(tree, path: tuple[str, ...]):
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
    sharding = _at(shardings, path)
    raw = jax.make_array_from_callback(
      tensor.shape, hf_sharding(kind, sharding), lambda index, tensor=tensor: tensor[index]
    )
    array = raw  # what is stored as it is kept, such as a large embedding, is not copied again
    if kind is not Transform.SAME or raw.dtype != np.float32:
      array = _to_param(kind, _at(shapes, path).shape, sharding)(raw)
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
    params: parameters of the decoder, on any devices that this process can read.
    cfg: its geometry.
    hf: its config.json.
    tokenizer: its tokenizer.
    folder: what to write; it appears when it is whole.
    source: the checkpoint that the parameters came from. Each tensor gets the dtype that it had
      there, and generation_config.json is kept.
    shard_bytes: largest file.

  Raises:
    UserError: as `check_export`.
  """
  check_export(folder)
  dtypes = {}
  if source is not None:
    dtypes = {name: _DTYPES[t.dtype] for name, t in check_tensors(source, cfg).items()}
  shards = _plan_shards(cfg, dtypes, shard_bytes)
  paths = {name: (path, kind) for path, (name, kind) in parameter_table(cfg).items()}
  unfinished = pathlib.Path(
    tempfile.mkdtemp(prefix=f"{folder.name}-incomplete-", dir=folder.parent)
  )
  try:
    for file, names in shards.items():
      tensors = {}
      for name in names:
        path, kind = paths[name]
        tensor = to_hf(kind, np.asarray(_at(params, path)))
        tensors[name] = np.ascontiguousarray(tensor, dtype=dtypes.get(name, "float32"))
      # transformers refuses files that do not say which framework's layout they have.
      save_file(tensors, unfinished / file, metadata={"format": "pt"})
    if len(shards) > 1:
      weight_map = {name: file for file, names in shards.items() for name in names}
      index = {"metadata": {}, "weight_map": weight_map}
      (unfinished / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (unfinished / _CONFIG).write_text(json.dumps(hf, indent=2) + "\n")
    tokenizer.save_pretrained(unfinished)
    if source is not None and (kept := source.folder / "generation_config.json").is_file():
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
  for name, _, shape in _layout(cfg):
    size = math.prod(shape) * (2 if dtypes.get(name, "float32") != "float32" else 4)
    if groups[-1] and used + size > shard_bytes:
      groups.append([])
      used = 0
    groups[-1].append(name)
    used += size
  if len(groups) == 1:
    return {_WEIGHTS: groups[0]}
  name = lambda i: f"model-{i:05}-of-{len(groups):05}.safetensors"
  return {name(i): names for i, names in enumerate(groups, 1)}
