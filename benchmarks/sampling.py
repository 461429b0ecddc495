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
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.peers import PEERS, Peer, load, random_model
from benchmarks.timing import (
  add_model_arguments,
  command_parser,
  in_turn,
  machine,
  machine_rates,
  print_columns,
  run,
)
from spo_jax.errors import UserError
from spo_jax.forest import Forest
from spo_jax.infra.mesh import make_mesh
from spo_jax.models.decoder import DecoderConfig, count_params
from spo_jax.sampling import strategies
from spo_jax.sampling.sampler import Sampler
from spo_jax.sampling.token import SamplingConfig

NEVER = (-1,)  # stop ids of which none is ever drawn

Engine = Callable[[int], float]  # seed -> the work that was done: number of tokens drawn


class Ours:
  """Our verbs on one model; `shared` False has a prefill for every continuation."""

  def __init__(self, cfg: DecoderConfig, params: Any, slots: int, *, shared: bool):
    self._params, self._shared = params, shared
    self._sampler = unending(cfg, make_mesh(-1, 1, 1), slots)

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
    return grow(self._sampler, self._params, prompts, branches, new_tokens, seed)


def unending(cfg: DecoderConfig, mesh: jax.sharding.Mesh, slots: int) -> Sampler:
  """A sampler of whose continuations none ends early."""
  return Sampler(
    cfg, mesh, NEVER, SamplingConfig(), slots, refill_share=1.0, suffix_chunks=4, prefill_chunk=0
  )


def grow(
  sampler, params, prompts: np.ndarray, branches: tuple[int, ...], new_tokens: int, seed: int
) -> Forest:
  """A tree for each of the prompts [R, P], segments of S tokens."""
  lengths = np.full(len(prompts), prompts.shape[1], np.int32)
  keys = jax.random.split(jax.random.key(seed), len(prompts))
  return strategies.grow_tree(
    sampler,
    params,
    strategies.Prompts(prompts.astype(np.int32), lengths, keys),
    branches=branches,
    budgets=(new_tokens,) * len(branches),
  )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = command_parser("sampling", __doc__)
  add_model_arguments(parser)
  add = functools.partial(parser.add_argument, type=int)
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
  cells = {}
  for name, one in record["engines"].items():
    seconds = one["seconds"]
    times = (min(seconds), statistics.median(seconds), max(seconds), one["first_s"])
    ratio = per_token[name] / per_token["ours"]
    cells[name] = (f"{1 / per_token[name]:.0f}", *(f"{x:.2f}" for x in (*times, ratio)))
  print_columns(("tokens/s", "min s", "median s", "max s", "first s", "to ours"), cells)


def main(argv: Sequence[str] | None = None) -> int:
  """Measures and prints; returns the exit status."""
  return run("sampling", measure, parse_args(argv))


def measure(args: argparse.Namespace) -> None:
  """Every batch in turn.

  Raises:
    UserError: if the model or a batch cannot be made.
  """
  model = random_model(args.layers, args.width, args.vocab)
  names = () if args.tree else args.peers
  peers = load(PEERS, names, model, args.prompt + args.new)
  common = {
    "benchmark": "sampling",
    "machine": machine(),
    "jax": jax.__version__,
    **vars(args),
    "parameters": count_params(model.params),
    **machine_rates(),
  }
  for batch in args.batch:
    timed = in_turn(engines(args, batch, model.cfg, model.params, peers), args.repeats)
    found = {
      name: {"first_s": one.first_s, "seconds": one.seconds, "tokens": one.results[0]}
      for name, one in timed.items()
    }
    record = common | {"batch": batch, "engines": found}
    print_table(record)
    print(json.dumps(record))


if __name__ == "__main__":
  sys.exit(main())
