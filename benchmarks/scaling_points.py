"""Points of `benchmarks.scaling`: what is sampled at each, and what is measured of it."""

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import Model
from benchmarks.sampling import grow, unending
from benchmarks.timing import in_turn
from spo_jax.errors import UserError
from spo_jax.infra.mesh import make_mesh, shard_rows
from spo_jax.infra.topology import GIB
from spo_jax.models.decoder import count_params
from spo_jax.planning.minimum import Work, step_work
from spo_jax.planning.programs import Level
from spo_jax.sampling.sampler import Sampler, jit_decode

AXES = ("batch", "context", "branches")
LEVELS = 3  # of the trees


@dataclasses.dataclass(frozen=True)
class Point:
  """Trees that are sampled: prompts of P tokens, children of a node by depth, segments of S."""

  axis: str
  size: int
  prompts: int
  branches: tuple[int, ...]
  prompt: int
  new: int

  def levels(self) -> list[Level]:
    """The calls of decode."""
    last = len(self.branches) - 1
    return [
      Level(
        rows=self.prompts * math.prod(self.branches[:i]),
        n=n,
        prefix=self.prompt + i * self.new,
        budget=self.new,
        keep_cache=i < last,
      )
      for i, n in enumerate(self.branches)
    ]

  @property
  def steps(self) -> int:
    """Decode steps of all levels."""
    return self.new * len(self.branches)


def make_point(args: argparse.Namespace, axis: str, size: int) -> Point:
  """The point of a size on an axis.

  Raises:
    UserError: if the leaves cannot be dealt to trees of so many branches.
  """
  if axis == "batch":
    return Point(axis, size, size, (1,), args.prompt, args.new)
  if axis == "context":
    return Point(axis, size, args.context_prompts, (args.samples,), size, args.context_new)
  if args.leaves % size**LEVELS:
    raise UserError(
      f"--branches {size} makes trees of {size**LEVELS} leaves, which do not divide --leaves "
      f"{args.leaves}: use a multiple"
    )
  trees = args.leaves // size**LEVELS
  return Point(axis, size, trees, (size,) * LEVELS, args.prompt, args.segment)


def held_bytes(model: Model, point: Point) -> int:
  """Bytes that the point's largest decode must hold: weights, keys and values, logits."""
  cfg, level = model.cfg, point.levels()[-1]
  number = jnp.dtype(cfg.dtype).itemsize
  rows = level.rows * level.n
  tokens = level.rows * level.prefix + rows * level.budget
  cache = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * tokens * number
  logits = rows * cfg.vocab_size * jnp.dtype(jnp.float32).itemsize
  return count_params(model.params) * jnp.dtype(jnp.float32).itemsize + cache + logits


def check_fits(model: Model, point: Point, memory: int) -> None:
  """Checks a point before anything is compiled.

  Raises:
    UserError: if what it must hold is more than a device's bytes.
  """
  if (held := held_bytes(model, point)) > memory:
    raise UserError(
      f"--{point.axis} {point.size} must hold {held / GIB:.1f} GiB of weights, keys, values and "
      f"logits, and there are {memory / GIB:.1f}: use less"
    )


def least_of_steps(model: Model, point: Point) -> Iterator[dict[str, Work]]:
  """What each decode step must do, by part."""
  for level in point.levels():
    for step in range(level.budget):
      yield step_work(model.cfg, model.params, level.rows, level.n, level.prefix - 1, step + 1)


def roofline(parts: Mapping[str, Work], rates: Mapping[str, float]) -> dict[str, float]:
  """Seconds that parts of one program must take: of products, and of reading and writing."""
  return {
    "matmul_s": sum(work.flops for work in parts.values()) / rates["matmul_gflops"] / 1e9,
    "copy_s": sum(work.accessed for work in parts.values()) / rates["copy_gb_s"] / 1e9,
  }


class Clocked:
  """A sampler whose verbs are waited for, with the seconds that each has taken."""

  def __init__(self, sampler: Sampler):
    self._sampler = sampler
    self._compiled: dict[tuple, jax.stages.Compiled] = {}
    self.compile_s = 0.0  # of decode
    self.seconds: dict[str, float] = {}

  def restart(self) -> None:
    """Forgets the seconds of verbs."""
    self.seconds = dict.fromkeys(("prefill", "decode", "extend"), 0.0)

  def prefill(self, *args):
    """See `Sampler.prefill`."""
    return self._wait("prefill", self._sampler.prefill, *args)

  def extend(self, *args):
    """See `Sampler.extend`."""
    return self._wait("extend", self._sampler.extend, *args)

  def decode(self, params, prefix, groups, **static):
    """See `Sampler.decode`; the first call of a shape compiles before the clock begins."""
    key = (groups.starts.shape, prefix.positions.shape)
    if key not in self._compiled:
      decode_cfg = self._sampler.decode_config(**static)
      sharded = shard_rows(self._sampler.mesh, groups)
      began = time.perf_counter()
      lowered = jit_decode.lower(self._sampler.cfg, decode_cfg, params, prefix, sharded)
      self._compiled[key] = lowered.compile()
      self.compile_s += time.perf_counter() - began
    return self._wait("decode", self._sampler.decode, params, prefix, groups, **static)

  def peak_bytes(self) -> int:
    """Most bytes that a decode holds: arguments, temporaries and outputs."""
    stats = [compiled.memory_analysis() for compiled in self._compiled.values()]
    return max(
      s.argument_size_in_bytes + s.temp_size_in_bytes + s.output_size_in_bytes for s in stats
    )

  def _wait(self, verb, call, *args, **static):
    began = time.perf_counter()
    result = jax.block_until_ready(call(*args, **static))
    self.seconds[verb] += time.perf_counter() - began
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
  """Of repeats."""
  return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def random_prompts(vocab: int, rows: int, tokens: int) -> np.ndarray:
  """[R, P] int32."""
  return np.random.default_rng(0).integers(0, vocab, (rows, tokens), np.int32)


def measure_point(
  model: Model, point: Point, repeats: int, rates: Mapping[str, float]
) -> dict[str, Any]:
  """The figures of a point.

  Tokens a second are of all that follows the prefill: decode, extend and what the host does. A
  decode step is the mean of the steps of all levels, and so is what it must do.
  """
  prompts = random_prompts(model.cfg.vocab_size, point.prompts, point.prompt)
  sampler = Clocked(unending(model.cfg, make_mesh(1, 1, 1), point.levels()[-1].rows))

  def call(turn: int) -> tuple[int, dict[str, float]]:
    sampler.restart()
    forest = grow(sampler, model.params, prompts, point.branches, point.new, turn)
    return int(forest.lengths[forest.depth > 0].sum()), dict(sampler.seconds)

  timed = in_turn({"": call}, repeats)[""]
  tokens, _ = timed.results[0]
  verbs = [seconds for _, seconds in timed.results[1:]]
  drawing = [s - one["prefill"] for s, one in zip(timed.seconds, verbs, strict=True)]
  least = list(least_of_steps(model, point))
  times = [roofline(parts, rates) for parts in least]
  mean = lambda values: sum(values) / point.steps
  step_s = spread([one["decode"] / point.steps for one in verbs])
  roofline_s = mean(max(one.values()) for one in times)
  return {
    **dataclasses.asdict(point),
    "continuations": point.levels()[-1].rows * point.branches[-1],
    "tokens": tokens,
    "tokens_per_s": spread([tokens / seconds for seconds in drawing]),
    "step_s": step_s,
    "prefill_s": statistics.median(one["prefill"] for one in verbs),
    "extend_s": statistics.median(one["extend"] for one in verbs),
    "first_s": timed.first_s,
    "compile_s": sampler.compile_s,
    "peak_bytes": sampler.peak_bytes(),
    "step_flops": mean(work.flops for parts in least for work in parts.values()),
    "step_bytes": mean(work.accessed for parts in least for work in parts.values()),
    "bound": max(("matmul_s", "copy_s"), key=lambda name: mean(one[name] for one in times))[:-2],
    "roofline_s": roofline_s,
    "roofline_tokens_per_s": tokens / roofline_s / point.steps,
    "efficiency": roofline_s / step_s["median"],
  }
