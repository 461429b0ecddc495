"""Runs that went on elsewhere are compared: parameters too, and that they did go on."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import meshes, restores
from spo_jax.errors import UserError
from tests.benchmarks.test_meshes import make_run


def make_restored(folder, weight=1.0, name="w", **found):
  return restores.Restored(
    make_run(folder, **found), {name: np.array([0.5, weight], np.float32), "v": np.ones(2)}
  )


@pytest.mark.parametrize(
  ("change", "found"),
  [
    ({}, {"train/loss": 0.0, "parameters": 0.0}),
    ({"weight": 1.25}, {"train/loss": 0.0, "parameters": 0.25}),
    ({"loss": 0.75}, {"train/loss": 0.25, "parameters": 0.0}),
    ({"name": "u"}, "other parameters"),
    ({"tokens": ("2",)}, "other tokens"),
  ],
)
def test_parameters_are_compared_too(tmp_path, change, found):
  runs = make_restored(tmp_path / "one"), make_restored(tmp_path / "other", **change)
  if isinstance(found, dict):
    assert restores.differences(*runs) == found
  else:
    with pytest.raises(UserError, match=found):
      restores.differences(*runs)


def test_a_run_that_began_anew_is_told(tmp_path):
  workdir = tmp_path / f"spo_tree_onto_{meshes.words((8, 1, 1, 1))}"
  make_run(workdir)
  (workdir / "model").mkdir()
  save_file({"w": np.ones(2, np.float32)}, workdir / restores.MODEL)
  log = tmp_path / f"{workdir.name}.log.0"
  log.write_text("ready after 1.0 s\n")
  base = tmp_path / "base"
  with pytest.raises(UserError, match="did not go on after iteration 2"):
    restores.restore(base, "spo_tree", (8, 1, 1, 1))
  log.write_text("resumed after iteration 2\n")
  assert restores.restore(base, "spo_tree", (8, 1, 1, 1)).parameters["w"].tolist() == [1, 1]
