"""Runs on other meshes are compared: sampled tokens and counts exactly, sums of floats nearly."""

import json
import math

import pytest

from benchmarks import meshes
from spo_jax.errors import UserError

NODE = {"parent": 0, "tokens": ["1"], "reward": 1.0, "finished": True, "probe": False}


def make_run(folder, loss=0.5, reward=0.25, tokens=("1",), iterations=2):
  (folder / "rollouts").mkdir(parents=True)
  rows = [
    {"iteration": i, "train/loss": loss, "train/reward_mean": reward, "time/step_s": id(folder)}
    for i in range(iterations)
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  node = NODE | {"tokens": list(tokens), "advantage": loss}
  for name in meshes.ROLLOUTS:
    (folder / "rollouts" / f"{name}.json").write_text(json.dumps({"nodes": [node]}))
  return meshes.read(folder)


@pytest.mark.parametrize(
  ("change", "found"),
  [
    ({}, 0.0),
    ({"loss": 0.75}, 0.25),
    ({"loss": None}, "train/loss of iteration 0: None in place of 0.5"),
    ({"reward": 0.5}, "reward_mean of iteration 0: 0.5 in place of 0.25"),
    ({"tokens": ("2",)}, "other tokens"),
    ({"iterations": 1}, "1 iterations in place of 2"),
  ],
)
def test_only_sums_may_differ(tmp_path, change, found):
  runs = make_run(tmp_path / "one"), make_run(tmp_path / "other", **change)
  if isinstance(found, float):
    assert meshes.differences(*runs) == {"train/loss": found}
  else:
    with pytest.raises(UserError, match=found):
      meshes.differences(*runs)


def test_every_mesh_has_all_devices():
  assert {math.prod(sizes) for sizes in meshes.MESHES} == {meshes.DEVICES}
