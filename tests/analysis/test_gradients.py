"""Gradients that the instrument measures against that of J, written out over all responses."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from spo_jax.analysis import gradients
from spo_jax.analysis.alignment import mean_cosine, signal_to_noise, squared_norm, trust
from spo_jax.analysis.policy import Method
from tests.analysis.worlds import LONGEST, make_world, objective

BATCHES = 16


def nothing(*_, **__):
  pass


@pytest.fixture(scope="module")
def exact():
  run, params = make_world()
  return np.asarray(ravel_pytree(jax.grad(lambda p: objective(run, p))(params))[0], np.float64)


def method(name, config, **changes):
  for path, value in changes.items():
    part, field = path.split("__")
    config = dataclasses.replace(
      config, **{part: dataclasses.replace(getattr(config, part), **{field: value})}
    )
  return Method(name, config)


@pytest.fixture(scope="module")
def measured():
  """Methods that are unbiased, and two that are not."""
  run, params = make_world()
  tree = {"rollout__strategy": "tree"}
  methods = [
    method("RLOO", run.config, loss__normalization="constant"),
    method("tree", run.config, **tree, loss__segment_weights="share"),
    method("tree, unweighted", run.config, **tree),
    method(
      "no baseline, masked", run.config, advantage__kind="reward", loss__use_probability_mask=True
    ),
  ]
  return gradients.measure(
    run, params, methods, "train", tokens=6000, batches=BATCHES, prompts=256, advance=nothing
  )


def test_rloo_is_the_gradient_of_the_expected_reward(measured, exact):
  found = measured["RLOO"]
  ascent = -LONGEST * found.pooled(1).astype(np.float64)  # the loss is divided by it
  along = ascent @ exact / (exact @ exact)
  assert abs(along.mean() - 1) < 3 * along.std() / np.sqrt(BATCHES) < 0.1
  cosine = ascent.mean(0) @ exact / np.linalg.norm(ascent.mean(0)) / np.linalg.norm(exact)
  assert cosine > 0.98


@pytest.mark.parametrize(
  "name, unbiased",
  [("RLOO", True), ("tree", True), ("tree, unweighted", False), ("no baseline, masked", False)],
)
def test_mean_cosine_tells_the_unbiased_from_the_biased(measured, exact, name, unbiased):
  rows = measured[name].pooled(1)
  truth = -np.tile(exact, (4, 1)).astype(np.float32)
  cosine = mean_cosine(rows, truth)
  assert cosine.error < 0.03
  assert (abs(cosine.value - 1) < 3 * cosine.error) == unbiased, cosine
