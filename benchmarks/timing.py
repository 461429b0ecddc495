"""What the benchmarks share: the machine in words and numbers, calls timed in turn, a table."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spo_jax.command_line import USER_ERROR_STATUS
from spo_jax.errors import UserError

# Width of a square matrix and length of a copy: on an accelerator so large that the call is little.
CPU_SIZES = (1 << 10, 1 << 25)
ACCELERATOR_SIZES = (1 << 13, 1 << 28)
RATE_REPEATS = 7


class Timed(NamedTuple):
  """Calls of one function."""

  first_s: float  # of the first, which compiles
  seconds: list[float]  # of the others
  results: list[Any]  # of all


def in_turn(
  calls: Mapping[str, Callable[[int], Any]], repeats: int, pause: float = 0.0
) -> dict[str, Timed]:
  """Times calls in turn: a first one of each, then so many more.

  Args:
    calls: by name; each takes the number of the turn.
    repeats: calls after the first.
    pause: seconds before a call, in which threads of the one before that still spin go to sleep.

  Returns:
    By name.
  """
  found = {name: ([], []) for name in calls}
  for turn in range(repeats + 1):
    for name, call in calls.items():
      time.sleep(pause)
      began = time.perf_counter()
      result = call(turn)
      seconds, results = found[name]
      seconds.append(time.perf_counter() - began)
      results.append(result)
  return {
    name: Timed(seconds[0], seconds[1:], results) for name, (seconds, results) in found.items()
  }


def machine() -> str:
  """The device, in words."""
  device = jax.devices()[0]
  return (
    f"{device.device_kind} ({device.platform}), {platform.machine()}, {os.cpu_count()} CPU cores"
  )


def machine_rates(dtype: str = "float32") -> dict[str, float]:
  """A device's best: matmuls of a dtype in GFLOP/s, copies in GB/s, read and written.

  A copy lies where its original did: new memory takes an operating system ten times as long.
  """
  size, floats = CPU_SIZES if jax.default_backend() == "cpu" else ACCELERATOR_SIZES
  square, line = jnp.ones((size, size), dtype), jnp.ones(floats)
  matmul = jax.jit(lambda x: x @ x)
  amounts = {"matmul_gflops": 2 * size**3, "copy_gb_s": 2 * line.nbytes}
  calls = {
    "matmul_gflops": lambda _: jax.block_until_ready(matmul(square)),
    "copy_gb_s": overwriting(lambda x: (x + 1, ()), line),
  }
  return {
    name: amounts[name] / min(timed.seconds) / 1e9
    for name, timed in in_turn(calls, RATE_REPEATS).items()
  }


def overwriting(function: Callable[..., Any], changed, *args) -> Callable[[int], Any]:
  """A call that is timed, of a function that returns (its first argument changed, more).

  What it changes it writes over, as a loop does, so that a copy of it is made here.
  """
  jitted = jax.jit(function, donate_argnums=0)
  kept = [jax.device_put(jax.tree.map(jnp.copy, changed), jax.devices()[0])]

  def call(_) -> None:
    new, more = jitted(kept.pop(), *args)
    jax.block_until_ready(more)
    kept.append(jax.block_until_ready(new))

  return call


def run(name: str, measure: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
  """Calls a benchmark; a mistake is told in one line. Returns the exit status."""
  try:
    measure(args)
  except UserError as error:
    print(f"{name}: {error}", file=sys.stderr)
    return USER_ERROR_STATUS
  return 0


def command_parser(name: str, told: str) -> argparse.ArgumentParser:
  """The parser of `python -m benchmarks.NAME`, whose help tells what its module does."""
  return argparse.ArgumentParser(
    prog=f"python -m benchmarks.{name}",
    description=told,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
  """The size of the random model."""
  for name, size in (("--layers", 4), ("--width", 256), ("--vocab", 8192)):
    parser.add_argument(name, type=int, default=size)


def print_columns(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
  """A table of cells, aligned to the right of their columns; the first column is the row's name."""
  width = max(map(len, rows))
  widths = [
    max(len(name), *(len(cells[i]) for cells in rows.values())) for i, name in enumerate(columns)
  ]
  for name, cells in {"": columns, **rows}.items():
    line = "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
    print(f"{name:<{width}}{line}")
