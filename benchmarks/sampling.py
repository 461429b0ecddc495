"""Tokens a second of the sampler, beside others on the same weights.

  python -m benchmarks.sampling --batch 64 256
  python -m benchmarks.sampling --batch 64 --samples 16 --prompt 512
  python -m benchmarks.sampling --tree 6 6 6 --new 32

All engines draw from one random Qwen2 model, in turn and in one process: `ours`; `plain`, ours with
a prefill for every continuation, so without shared prefixes; `hf`, generate of Hugging Face, and
`tunix`, google-tunix's Sampler, where they are installed (neither samples trees). No continuation
ends early. The first call of each compiles, and is told apart. Prints a table and a line of JSON
for each batch; tokens are those drawn.
"""

import argparse
import functools
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.peers import PEERS, Peer, missing
from benchmarks.random_model import model_config
from benchmarks.update import machine
from spo_jax.command_line import USER_ERROR_STATUS
from spo_jax.errors import UserError
from spo_jax.infra.mesh import make_mesh
from spo_jax.models.decoder import DecoderConfig, count_params, init_params
from spo_jax.models.export import export_model
from spo_jax.models.families import config_from_hf
from spo_jax.sampling import strategies
from spo_jax.sampling.sampler import Sampler
from spo_jax.sampling.token import SamplingConfig

NEVER = (-1,)  # stop ids of which none is ever drawn
MATMUL_SIZE = 1024
COPY_FLOATS = 1 << 25
RATE_REPEATS = 7

Engine = Callable[[int], float]  # seed -> the work that was done: number of tokens drawn


class Ours:
  """Our verbs on one model; `shared` False has a prefill for every continuation."""

  def __init__(self, cfg: DecoderConfig, params: Any, slots: int, *, shared: bool):
    self._params, self._shared = params, shared
    self._sampler = Sampler(
      cfg, make_mesh(-1, 1, 1), NEVER, SamplingConfig(), slots, refill_share=0.25
    )

  def sample(self, prompts: np.ndarray, n: int, new_tokens: int, seed: int) -> np.ndarray:
    """[R, n, S] tokens after prompts [R, P]."""
    R = len(prompts)
    if not self._shared:
      prompts, n = np.repeat(prompts, n, axis=0), 1
    forest = self._grow(prompts, (n,), new_tokens, seed)
    drawn = np.repeat(forest.depth > 0, forest.lengths)
    return forest.tokens[drawn].reshape(R, -1, new_tokens)

  def sample_trees(
    self, prompts: np.ndarray, branches: Sequence[int], new_tokens: int, seed: int
  ) -> int:
    """Samples a tree a prompt, segments of S tokens; returns the tokens drawn."""
    if self._shared:
      forest = self._grow(prompts, tuple(branches), new_tokens, seed)
      return int(forest.lengths[forest.depth > 0].sum())
    total = 0
    for level, n in enumerate(branches):
      drawn = self.sample(prompts, n, new_tokens, seed + level)
      total += drawn.size
      above = np.repeat(prompts, n, axis=0)
      prompts = np.concatenate([above, drawn.reshape(len(above), -1)], axis=1)
    return total

  def _grow(self, prompts, branches, new_tokens, seed):
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    return strategies.grow_tree(
      self._sampler,
      self._params,
      strategies.Prompts(prompts.astype(np.int32), lengths, keys),
      branches=branches,
      budgets=(new_tokens,) * len(branches),
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.sampling",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = functools.partial(parser.add_argument, type=int)
  add("--layers", default=4)
  add("--width", default=256)
  add("--vocab", default=8192)
  add("--prompt", default=64, help="tokens of a prompt")
  add("--new", default=128, help="tokens of a continuation, or of a tree's segment")
  add("--batch", nargs="+", default=[64], help="continuations in all; with --tree, prompts")
  add("--samples", default=1, help="continuations of a prompt")
  add("--tree", nargs="+", default=[], help="children of a node, by depth: sample trees instead")
  add("--repeats", default=5)
  add("--peers", type=str, nargs="*", choices=PEERS, default=list(PEERS))
  args = parser.parse_args(argv)
  if wrong := [size for size in args.batch if size % args.samples]:
    parser.error(f"--batch {wrong[0]} is no multiple of --samples {args.samples}")
  if args.tree and args.samples > 1:
    parser.error("--samples is of prompts without --tree")
  return args


def load_peers(
  names: Sequence[str], context: int, cfg: DecoderConfig, hf: dict[str, Any], params: Any
) -> dict[str, Peer]:
  """The peers that are installed, with our parameters; of the others a word on stderr."""
  peers = {}
  with tempfile.TemporaryDirectory(prefix="spo_jax_sampling_") as folder:
    checkpoint = pathlib.Path(folder) / "model"
    export_model(params, cfg, hf, None, checkpoint)
    for name in names:
      if gone := missing(name):
        print(f"{name} is left out: {', '.join(gone)} is not installed", file=sys.stderr)
      else:
        peers[name] = PEERS[name](checkpoint, context)
  return peers


def engines(
  args: argparse.Namespace, batch: int, cfg: DecoderConfig, params: Any, peers: Mapping[str, Peer]
) -> dict[str, Engine]:
  """What is timed for a batch.

  Raises:
    UserError: if the prompts cannot be divided over the devices.
  """
  R = batch if args.tree else batch // args.samples
  if R % len(jax.devices()):
    raise UserError(
      f"--batch {batch} makes {R} prompts, which {len(jax.devices())} devices cannot divide: use a "
      "multiple"
    )
  prompts = np.random.default_rng(0).integers(0, args.vocab, (R, args.prompt))
  slots = R * math.prod(args.tree) if args.tree else batch
  make = functools.partial(Ours, cfg, params, slots)
  ours = {"ours": make(shared=True), "plain": make(shared=False)}
  if args.tree:
    return {
      name: functools.partial(one.sample_trees, prompts, args.tree, args.new)
      for name, one in ours.items()
    }
  if args.samples == 1:
    del ours["plain"]  # there is nothing to share
  draw = {name: one.sample for name, one in ours.items()} | dict(peers)

  def count(seed, sample):
    tokens = sample(prompts, args.samples, args.new, seed)
    if tokens.shape != (R, args.samples, args.new):
      raise AssertionError(f"{tokens.shape} tokens where {(R, args.samples, args.new)} are due")
    return tokens.size

  return {name: functools.partial(count, sample=sample) for name, sample in draw.items()}


def in_turn(calls: Mapping[str, Engine], repeats: int) -> dict[str, dict[str, Any]]:
  """Times calls in turn: a first one of each, then so many more.

  Returns:
    By name: `first_s`, `seconds` of the others, `tokens` of a call.
  """
  found = {name: {"seconds": []} for name in calls}
  for turn in range(repeats + 1):
    for name, call in calls.items():
      began = time.perf_counter()
      tokens = call(turn)
      seconds = time.perf_counter() - began
      if turn:
        found[name]["seconds"].append(seconds)
      else:
        found[name] |= {"first_s": seconds, "tokens": tokens}
  return found


def machine_rates() -> dict[str, float]:
  """The machine's best: float32 matmuls in GFLOP/s, copies in GB/s, read and written."""
  square, line = jnp.ones((MATMUL_SIZE, MATMUL_SIZE)), jnp.ones(COPY_FLOATS)
  matmul, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)

  def call(function, x, amount):
    jax.block_until_ready(function(x))
    return amount

  calls = {
    "matmul_gflops": lambda _: call(matmul, square, 2 * MATMUL_SIZE**3),
    "copy_gb_s": lambda _: call(copy, line, 2 * line.nbytes),
  }
  return {
    name: one["tokens"] / statistics.median(one["seconds"]) / 1e9
    for name, one in in_turn(calls, RATE_REPEATS).items()
  }


def print_table(record: Mapping[str, Any]) -> None:
  """The record, to be read."""
  what = f"{record['batch']} continuations, {record['samples']} a prompt"
  if record["tree"]:
    what = f"{record['batch']} trees {record['tree']}"
  print(
    f"{record['machine']}, {record['matmul_gflops']:.0f} GFLOP/s, {record['copy_gb_s']:.0f} GB/s; "
    f"{record['layers']} layers of {record['width']}, vocabulary {record['vocab']}; "
    f"{what}, {record['prompt']} + {record['new']} tokens"
  )
  per_token = {
    name: statistics.median(one["seconds"]) / one["tokens"]
    for name, one in record["engines"].items()
  }
  columns = ("tokens/s", "min s", "median s", "max s", "first s", "to ours")
  print(f"{'':<8}" + "".join(f"{name:>10}" for name in columns))
  for name, one in record["engines"].items():
    seconds = one["seconds"]
    times = (min(seconds), statistics.median(seconds), max(seconds), one["first_s"])
    print(
      f"{name:<8}{1 / per_token[name]:>10.0f}"
      + "".join(f"{x:>10.2f}" for x in (*times, per_token[name] / per_token["ours"]))
    )


def main(argv: Sequence[str] | None = None) -> int:
  """Measures and prints; a mistake is told in one line."""
  args = parse_args(argv)
  try:
    measure(args)
  except UserError as error:
    print(f"sampling: {error}", file=sys.stderr)
    return USER_ERROR_STATUS
  return 0


def measure(args: argparse.Namespace) -> None:
  """Every batch in turn.

  Raises:
    UserError: if the model or a batch cannot be made.
  """
  hf = model_config("qwen2", args.layers, args.width, args.vocab)
  cfg = config_from_hf(hf)
  params = jax.jit(lambda key: nn.unbox(init_params(cfg, key)))(jax.random.key(0))
  names = () if args.tree else args.peers
  peers = load_peers(names, args.prompt + args.new, cfg, hf, params)
  common = {
    "benchmark": "sampling",
    "machine": machine(),
    "jax": jax.__version__,
    **vars(args),
    "parameters": count_params(params),
    **machine_rates(),
  }
  for batch in args.batch:
    timed = in_turn(engines(args, batch, cfg, params, peers), args.repeats)
    record = common | {"batch": batch, "engines": timed}
    print_table(record)
    print(json.dumps(record))


if __name__ == "__main__":
  sys.exit(main())
