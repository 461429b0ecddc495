"""Compiled programs: a cache of them on disk, and a count of those that a process asked for.

Shapes are static everywhere, so a run compiles a handful of programs in its first iteration and
none later. The count is a metric, so that a run which does otherwise is seen to.
"""

import pathlib
from typing import NamedTuple

import jax
from jax import monitoring

# Told by JAX for each program that it compiles or reads from the cache.
_MADE = "/jax/core/compile/backend_compile_duration"
_CACHE_BYTES = 10 << 30  # the programs longest unused go first

_made: list[float] = []  # seconds that each program of this process took


def _listen(event: str, seconds: float, **_) -> None:
  if event == _MADE:
    _made.append(seconds)


monitoring.register_event_duration_secs_listener(_listen)


class Made(NamedTuple):
  """Programs that the process has compiled, or read from the cache."""

  programs: int
  seconds: float


def made_programs() -> Made:
  """Those since the process began, or rather since this module was imported."""
  return Made(len(_made), sum(_made))


class Meter:
  """Programs made since it was last read."""

  def __init__(self) -> None:
    self._seen = made_programs()

  def read(self) -> dict[str, float]:
    """Metrics: how many, and seconds."""
    before, self._seen = self._seen, made_programs()
    return {
      "time/programs": self._seen.programs - before.programs,
      "time/compile_s": self._seen.seconds - before.seconds,
    }


def keep_programs(folder: str) -> None:
  """Keeps compiled programs in a folder, so that the next process need not compile them.

  Args:
    folder: where; "" keeps none. What JAX_COMPILATION_CACHE_DIR names goes before it.
  """
  if jax.config.jax_compilation_cache_dir is None and folder:
    if "://" not in folder:
      folder = str(pathlib.Path(folder).expanduser())
      # Not of a bucket or of a folder that others fill: JAX then wants files that are not there.
      jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    jax.config.update("jax_compilation_cache_dir", folder)
  # A run has few programs, and the small ones add up to seconds.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
