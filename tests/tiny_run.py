"""A run small enough for tests: the real command with a tiny model and few prompts."""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax

from benchmarks import run_processes

REPOSITORY = pathlib.Path(__file__).parents[1]


def data_dir() -> str:
  """Where all runs find their data, once one has built it: a folder of the generators' version."""
  sources = sorted((REPOSITORY / "spo_jax" / "data").glob("*.py"))
  version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
  return os.path.join(tempfile.gettempdir(), f"spo_jax_test_data_{version}")


TINY = run_processes.TINY | {
  "iterations": 4,
  "data.data_dir": data_dir(),
  "rollout.prompts": 8,
  "eval.every": 2,
  "checkpoint.every": 2,
  "mesh.data": 1,
}


def command(config: str, workdir: pathlib.Path, **overrides) -> list[str]:
  """The command line of a tiny run; a field `a.b` is given as the keyword `a__b`."""
  fields = TINY | {name.replace("__", "."): value for name, value in overrides.items()}
  program = [sys.executable, "-m", "spo_jax.main"]
  return [
    *program,
    f"--config=configs/{config}",
    f"--workdir={workdir}",
    *run_processes.flags(fields),
  ]


def environment(devices: int = 1) -> dict[str, str]:
  """Variables for a child process on CPU devices, which compiles as the suite itself does."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
  }


def start(
  config: str,
  workdir: pathlib.Path,
  *,
  flags: Sequence[str] = (),
  devices: int = 1,
  **overrides,
) -> subprocess.Popen:
  """Starts a tiny run in a process of its own; `flags` are other than the config's."""
  return subprocess.Popen(
    [*command(config, workdir, **overrides), *flags],
    cwd=REPOSITORY,
    env=environment(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
