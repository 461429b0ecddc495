"""Seconds and memory of loading a checkpoint: `python -m benchmarks.loading`.

Writes a random Qwen2 checkpoint of the size asked for into a temporary folder, in several files,
and loads it in a process of its own, whose peak resident memory is told (on Linux, from /proc). On
a CPU the device's copy of the parameters is part of it.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
from flax import linen as nn
from safetensors.numpy import save_file

from benchmarks.update import machine
from spo_jax.infra.mesh import make_mesh
from spo_jax.models.decoder import init_params
from spo_jax.models.families import config_from_hf, hf_shape, parameter_table
from spo_jax.models.pretrained import find_pretrained, load_params

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
# Qwen2.5-1.5B but for the number of layers, which makes the size.
HF = {
  "model_type": "qwen2",
  "vocab_size": 151936,
  "hidden_size": 1536,
  "intermediate_size": 8960,
  "num_attention_heads": 12,
  "num_key_value_heads": 2,
  "tie_word_embeddings": True,
  "rope_theta": 1e6,
}


def parse_args() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--gib", type=float, default=2.0, help="least size of the checkpoint")
  parser.add_argument("--shard-gib", type=float, default=0.5, help="size of a file")
  parser.add_argument("--dtype", default="float32", choices=BYTES, help="of the checkpoint")
  parser.add_argument("--folder", help="where to put it, if not in the system's temporary folder")
  parser.add_argument("--load", help="load this checkpoint and print figures; used by the above")
  return parser.parse_args()


def tensor_shapes(hf: dict) -> dict[str, tuple[int, ...]]:
  """Shapes of a checkpoint's tensors by name."""
  cfg = config_from_hf(hf)
  shapes = nn.unbox(jax.eval_shape(lambda: init_params(cfg, jax.random.key(0))))
  named = {}
  for path, (name, kind) in parameter_table(cfg).items():
    node = shapes
    for step in path:
      node = node[step]
    named[name] = hf_shape(kind, node.shape)
  return named


def write_checkpoint(folder: pathlib.Path, args: argparse.Namespace) -> float:
  """Writes random tensors file by file; returns GiB written."""
  layers, size = 0, 0
  while size < args.gib * GIB:
    layers += 1
    hf = HF | {"num_hidden_layers": layers}
    shapes = tensor_shapes(hf)
    size = BYTES[args.dtype] * sum(int(np.prod(shape)) for shape in shapes.values())
  (folder / "config.json").write_text(json.dumps(hf))
  rng = np.random.default_rng(0)
  dtype = np.dtype(ml_dtypes.bfloat16 if args.dtype == "bfloat16" else np.float32)
  weight_map, shard, used = {}, {}, 0

  def flush():
    nonlocal shard, used
    file = f"model-{len(set(weight_map.values())):05}.safetensors"
    weight_map.update(dict.fromkeys(shard, file))
    save_file(shard, folder / file)
    shard, used = {}, 0

  for name, shape in shapes.items():
    shard[name] = rng.standard_normal(shape, np.float32).astype(dtype)
    used += shard[name].nbytes
    if used >= args.shard_gib * GIB:
      flush()
  flush()
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return size / GIB


def peak_gib() -> float:
  """Most resident memory of this process so far. (getrusage would count the parent's too.)"""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024 / GIB


def load(folder: str) -> dict[str, float]:
  """Loads a checkpoint; run in a fresh process, whose memory it tells."""
  found = find_pretrained(folder)
  cfg = config_from_hf(found.hf)
  mesh = make_mesh(-1, 1, 1)
  before = peak_gib()
  began = time.perf_counter()
  params = load_params(found, cfg, mesh)
  seconds = time.perf_counter() - began
  held = sum(x.nbytes for x in jax.tree.leaves(params)) / GIB
  return {"seconds": seconds, "before_gib": before, "peak_gib": peak_gib(), "parameters_gib": held}


def main() -> None:
  """Writes, loads, prints."""
  args = parse_args()
  if args.load:
    print(json.dumps(load(args.load)))
    return
  folder = pathlib.Path(tempfile.mkdtemp(prefix="spo_jax_loading_", dir=args.folder))
  try:
    size = write_checkpoint(folder, args)
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors")) / GIB
    command = [sys.executable, "-m", "benchmarks.loading", "--load", str(folder)]
    figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
  finally:
    shutil.rmtree(folder)
  ratio = figures["peak_gib"] / max(largest, figures["parameters_gib"])
  print(
    f"{machine()}; {size:.2f} GiB of {args.dtype} in files of at most {largest:.2f} GiB, "
    f"{figures['parameters_gib']:.2f} GiB of float32 parameters"
  )
  print(
    f"loaded in {figures['seconds']:.1f} s, {size / figures['seconds']:.2f} GiB/s; peak memory "
    f"{figures['peak_gib']:.2f} GiB ({figures['before_gib']:.2f} before), {ratio:.2f} of the "
    "larger of a file and the parameters"
  )
  record = {"benchmark": "loading", "machine": machine(), "jax": jax.__version__, **vars(args)}
  print(json.dumps(record | {"gib_written": size, "file_gib": largest, "ratio": ratio} | figures))


if __name__ == "__main__":
  main()
