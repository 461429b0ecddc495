"""Suite-wide switches: 8 virtual CPU devices, strict promotion, a cache of compiled programs."""

import gc
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling takes most of the suite's time, and tiny shapes gain nothing from optimised code. The
# older emitter of code for the CPU takes half the time for a program of a few operations, and code
# in one piece a sixth less than in pieces that are compiled side by side.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11):  # XLA ends a process whose flags it does not know
  flags = os.environ.get("XLA_FLAGS", "")
  for quick in ("use_fusion_emitters=false", "parallel_codegen_split_count=1"):
    flags += f" --xla_cpu_{quick}"
  os.environ["XLA_FLAGS"] = flags
# Tracing makes millions of objects that stay: looking for garbage among them finds none.
gc.set_threshold(200_000, 20, 100)
jax.config.update(
  "jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "spo_jax_test_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Linux allows a process 65,530 memory maps, every compiled program takes some, and a process that
# asks for more is aborted.
MOST_MEMORY_MAPS = 30_000
MEMORY_MAPS = pathlib.Path("/proc/self/maps")

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def pytest_collection_modifyitems(items):
  """Whole runs first, which stand beside this file: no worker is left with a long one."""
  items.sort(key=lambda item: item.path.parent != FIXTURES.parent)


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
  """Forgets compiled programs between modules when they have become many."""
  yield
  if MEMORY_MAPS.exists() and MEMORY_MAPS.read_text().count("\n") > MOST_MEMORY_MAPS:
    jax.clear_caches()


@pytest.fixture(scope="session")
def fixture_arrays():
  """Returns a loader: name of an `.npz` file in tests/fixtures -> dict of arrays."""

  def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as file:
      return dict(file)

  return load
