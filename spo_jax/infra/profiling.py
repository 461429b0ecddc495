"""Traces of chosen iterations, for TensorBoard's profile plugin and Perfetto."""

import contextlib
import pathlib
from collections.abc import Collection, Sequence

import jax

from spo_jax.errors import UserError

PROFILE_DIR = "profile"


def parse_iterations(words: Sequence[str], iterations: int) -> tuple[int, ...]:
  """The iterations that --profile names.

  Args:
    words: its comma-separated parts.
    iterations: how many the run has.

  Raises:
    UserError: if one of the words is no number of an iteration.
  """
  for word in words:
    if not word.isdecimal() or not 1 <= int(word) <= iterations:
      raise UserError(
        f"--profile={','.join(words)} must name iterations from 1 to {iterations}, as in "
        "--profile=3,4"
      )
  return tuple(int(word) for word in words)


def trace(
  workdir: pathlib.Path, iteration: int, chosen: Collection[int]
) -> contextlib.AbstractContextManager[None]:
  """Traces the block if its iteration is chosen, by each process into a folder of its own."""
  if iteration not in chosen:
    return contextlib.nullcontext()
  folder = workdir / PROFILE_DIR / f"iteration_{iteration}" / f"process_{jax.process_index()}"
  return jax.profiler.trace(str(folder))
