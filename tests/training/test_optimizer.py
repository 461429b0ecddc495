"""The learning rate by update, clipping by the global norm, decoupled weight decay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.training.optimizer import make_optimizer, make_schedule
from tests.tiny import optimizer_config

CONFIG = optimizer_config(learning_rate=0.1, clip_norm=1e9)


def rates(count, **fields) -> list[float]:
  schedule = make_schedule(dataclasses.replace(CONFIG, **fields))
  return [float(schedule(i)) for i in range(count)]


def updates(gradients, params, **fields) -> list:
  """Parameters after each of the gradients."""
  optimizer = make_optimizer(dataclasses.replace(CONFIG, **fields))
  state, history = optimizer.init(params), []
  for gradient in gradients:
    change, state = optimizer.update(gradient, state, params)
    params = jax.tree.map(jnp.add, params, change)
    history.append(params)
  return history


def test_schedule():
  np.testing.assert_allclose(rates(3), [0.1, 0.1, 0.1], rtol=1e-6)
  warm = [0.02, 0.04, 0.06, 0.08, 0.1, 0.1]
  np.testing.assert_allclose(rates(6, warmup_steps=4), warm, rtol=1e-6)
  cosine = [0.05 * (1 + np.cos(np.pi * t / 6)) for t in range(7)]
  np.testing.assert_allclose(rates(8, decay_steps=6), [*cosine, 0], rtol=1e-5, atol=1e-8)
  linear = [0.1 * (1 - t / 6) for t in range(7)]
  for warmup_steps, rise in ((0, []), (4, warm[:4])):
    fields = {"warmup_steps": warmup_steps, "decay_steps": warmup_steps + 6, "decay": "linear"}
    got = rates(warmup_steps + 8, **fields)
    np.testing.assert_allclose(got, [*rise, *linear, 0], rtol=1e-5, atol=1e-8)
  both = [*warm[:4], *cosine, 0]
  np.testing.assert_allclose(rates(12, warmup_steps=4, decay_steps=10), both, rtol=1e-5, atol=1e-8)


def test_no_update_is_of_no_effect():
  for fields in ({"warmup_steps": 4}, {"warmup_steps": 4, "decay_steps": 10}):
    assert rates(1, **fields)[0] > 0


def test_adam_moves_by_the_rate_and_follows_its_equations():
  rng = np.random.default_rng(0)
  gradients = [{"w": jnp.asarray(g, jnp.float32)} for g in rng.standard_normal((4, 3))]
  mean = square = want = np.zeros(3)
  for i, (gradient, got) in enumerate(
    zip(gradients, updates(gradients, {"w": jnp.zeros(3)}), strict=True), 1
  ):
    g = np.asarray(gradient["w"], np.float64)
    mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g**2
    want = want - 0.1 * (mean / (1 - 0.9**i)) / (np.sqrt(square / (1 - 0.95**i)) + 1e-8)
    np.testing.assert_allclose(got["w"], want, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_by_their_joint_norm():
  gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[0.0], [4.0]])}  # norm 5
  params = jax.tree.map(jnp.zeros_like, gradient)
  plain = {"eps": 1e8, "learning_rate": 1e8}  # the update is the gradient
  (clipped,) = updates([gradient], params, clip_norm=1.0, **plain)
  np.testing.assert_allclose(clipped["a"], [-0.6, 0], rtol=1e-5)
  np.testing.assert_allclose(clipped["b"], [[0], [-0.8]], rtol=1e-5)
  (whole,) = updates([gradient], params, clip_norm=5.5, **plain)
  np.testing.assert_allclose(whole["b"], [[0], [-4]], rtol=1e-5)


def test_weight_decay_is_decoupled_from_the_gradient():
  params = {"w": jnp.array([2.0, -1.0])}
  (after,) = updates([{"w": jnp.zeros(2)}], params, weight_decay=0.5)
  np.testing.assert_allclose(after["w"], [2 - 0.1 * 0.5 * 2, -1 + 0.1 * 0.5 * 1], rtol=1e-6)
  (after,) = updates([{"w": jnp.array([9.0, 9.0])}], params, weight_decay=0.5)
  np.testing.assert_allclose(after["w"], [2 - 0.1 - 0.1, -1 - 0.1 + 0.05], rtol=1e-5)
