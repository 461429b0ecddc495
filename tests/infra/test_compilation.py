import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from spo_jax.infra import compilation

SCRIPT = """
import jax
from spo_jax.infra import compilation
compilation.keep_programs({folder!r})
jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(3)).block_until_ready()
"""


def test_the_meter_counts_programs():
  meter = compilation.Meter()
  double = jax.jit(lambda x: x + x)
  inputs = [jnp.ones(n) for n in (11, 11, 12)]
  meter.read()
  counted = []
  for x in inputs:
    double(x)
    counted.append(meter.read())
  assert [metrics["time/programs"] for metrics in counted] == [1, 0, 1]
  assert counted[0]["time/compile_s"] > 0 == counted[1]["time/compile_s"]


def test_programs_are_kept_for_the_next_process(tmp_path):
  """Small ones too; home is understood."""
  environment = os.environ | {"HOME": str(tmp_path)}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  script = SCRIPT.format(folder="~/programs")
  subprocess.run([sys.executable, "-c", script], env=environment, check=True)
  kept = {path.name for path in (tmp_path / "programs").iterdir() if "cache" in path.name}
  assert any("lambda" in name for name in kept)


@pytest.fixture
def cache_settings():
  names = ("compilation_cache_dir", "compilation_cache_max_size")
  names += ("persistent_cache_min_compile_time_secs",)
  before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
  yield before
  for name, value in before.items():
    jax.config.update(name, value)


def test_a_cache_that_is_named_already_stays(cache_settings):
  """And so does its size: entries of others have no time of their last use, which a limit needs."""
  compilation.keep_programs("/elsewhere")
  for name in ("jax_compilation_cache_dir", "jax_compilation_cache_max_size"):
    assert getattr(jax.config, name) == cache_settings[name]


def test_only_a_local_folder_has_a_limit(cache_settings, tmp_path):
  for folder, limited in ((str(tmp_path), True), ("gs://bucket/programs", False)):
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_compilation_cache_max_size", -1)
    compilation.keep_programs(folder)
    assert jax.config.jax_compilation_cache_dir == folder
    assert (jax.config.jax_compilation_cache_max_size > 0) == limited


def test_no_folder_is_no_cache(cache_settings):
  jax.config.update("jax_compilation_cache_dir", None)
  compilation.keep_programs("")
  assert jax.config.jax_compilation_cache_dir is None
