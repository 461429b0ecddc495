"""Gradients that the instrument measures against that of J, written out over all responses."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from spo_jax.analysis import gradients
from spo_jax.analysis.alignment import align, mean_cosine
from spo_jax.analysis.policy import Method
from tests.analysis.worlds import LONGEST, make_world, objective

TOKENS, BATCHES = 1500, 12


def nothing(*_, **__):
  pass


@pytest.fixture(scope="module")
def exact():
  run, params = make_world()
  return np.asarray(
    ravel_pytree(jax.jit(jax.grad(lambda p: objective(run, p)))(params))[0], np.float64
  )


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
  tree = {"rollout__strategy": "tree", "rollout__branches": (2, 6)}
  masked = dataclasses.replace(run.config, probability_threshold=0.5)
  methods = [
    method("RLOO", run.config, loss__normalization="constant"),
    method("no baseline", run.config, advantage__kind="reward"),
    method("mask", masked, loss__use_probability_mask=True),
    method("tree, shares", run.config, **tree, loss__segment_weights="share"),
    method("tree", run.config, **tree),
    method("shrinkage", run.config, advantage__kind="shrinkage"),
    method(
      "tree, shrinkage, shares",
      run.config,
      **tree,
      advantage__kind="shrinkage",
      loss__segment_weights="share",
    ),
  ]
  return gradients.measure(
    run, params, methods, "train", tokens=TOKENS, batches=BATCHES, prompts=128, advance=nothing
  )


def test_rloo_is_the_gradient_of_the_expected_reward(measured, exact):
  found = measured["RLOO"]
  ascent = -LONGEST * found.pooled(1).astype(np.float64)  # the loss is divided by it
  along = ascent @ exact / (exact @ exact)
  assert abs(along.mean() - 1) < 3 * along.std() / np.sqrt(BATCHES) < 0.15
  cosine = ascent.mean(0) @ exact / np.linalg.norm(ascent.mean(0)) / np.linalg.norm(exact)
  assert cosine > 0.98


@pytest.mark.parametrize(
  "name, unbiased",
  [
    ("RLOO", True),
    ("no baseline", True),
    ("mask", False),
    ("tree, shares", True),
    ("tree", False),
    ("shrinkage", True),
    ("tree, shrinkage, shares", True),
  ],
)
def test_mean_cosine_tells_the_unbiased_from_the_biased(measured, exact, name, unbiased):
  truth = -np.tile(exact, (4, 1)).astype(np.float32)
  cosine = mean_cosine(measured[name].pooled(1), truth)
  assert cosine.error < 0.07
  assert (abs(cosine.value - 1) < 3 * cosine.error) == unbiased, cosine


def test_the_baseline_of_the_whole_forest_takes_noise_out(measured, exact):
  truth = -np.tile(exact, (4, 1)).astype(np.float32)
  ratio = lambda name: align(measured[name], truth, 1).signal_to_noise.value
  assert ratio("tree, shrinkage, shares") > 1.1 * ratio("tree, shares")
  assert ratio("shrinkage") > ratio("RLOO")


def test_cosines_rise_to_one_with_the_number_of_tokens(measured, exact):
  truth = -np.tile(exact, (4, 1)).astype(np.float32)
  small, large = (align(measured["RLOO"], truth, multiple) for multiple in (1, 6))
  assert small.cosine.value < large.cosine.value < 1.01
  # cos² = signal / (signal + noise)
  for found in (small, large):
    ratio = found.signal_to_noise.value
    assert abs(found.cosine.value - np.sqrt(ratio / (1 + ratio))) < 0.03
  assert large.tokens == 6 * small.tokens and large.updates == BATCHES // 6


def test_batches_are_of_the_asked_number_of_tokens(measured):
  tokens = measured["RLOO"].tokens
  assert np.all(np.abs(tokens / TOKENS - 1) < 0.1)
  assert measured["RLOO"].prompts != measured["tree"].prompts  # a tree has fewer tokens a prompt
