import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.sampling import token
from spo_jax.sampling.token import MOST_LANES, SamplingConfig, sample_token
from tests.sampling.reference import assert_drawn_from, truncated

DRAWS = 20_000
LOGITS = np.array([0.3, -1.0, 2.0, 0.3, 1.2, -3.0, 1.9, 0.0], np.float32)

sample = functools.partial(jax.jit, static_argnums=2)(sample_token)


@functools.partial(jax.jit, static_argnums=1)
def draw(logits, sampling, seed=0):
  keys = jax.random.split(jax.random.key(seed), DRAWS)
  return sample_token(keys, jnp.broadcast_to(logits, (DRAWS, len(logits))), sampling)


@pytest.mark.parametrize(
  "options",
  [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.7, "top_k": 3},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.7},
  ],
  ids=str,
)
def test_draws_follow_the_truncated_distribution(options):
  """And the log-prob is that of the distribution before truncation."""
  tokens, logprobs = draw(LOGITS, SamplingConfig(**options))
  assert_drawn_from(np.bincount(tokens, minlength=len(LOGITS)), truncated(LOGITS, **options))
  whole = truncated(LOGITS, temperature=options["temperature"])
  np.testing.assert_allclose(logprobs, np.log(whole)[tokens], rtol=1e-5)


def test_truncation_keeps_what_the_oracle_keeps():
  """Over random distributions, with ties, in vocabularies of one block, of several, and padded."""
  rng = np.random.default_rng(0)
  for V, rows in ((8, 4), (3 * MOST_LANES, 2), (MOST_LANES + 7, 2)):
    logits = np.round(rng.normal(size=(rows, V)) * 2).astype(np.float32)
    for top_k, top_p in [(0, 0.5), (3, 1.0), (4, 0.8)]:
      kept = [truncated(row, top_k=top_k, top_p=top_p) for row in logits]
      times = 800
      keys = jax.random.split(jax.random.key(V + top_k), rows * times)
      sampling = SamplingConfig(top_k=top_k, top_p=top_p)
      tokens, _ = sample(keys, np.repeat(logits, times, axis=0), sampling)
      for drawn, mass in zip(tokens.reshape(rows, times), kept, strict=True):
        assert_drawn_from(np.bincount(drawn, minlength=V), mass, level=1e-4)


@pytest.mark.parametrize("V", [5 * MOST_LANES, 2 * MOST_LANES + 1, 7])
def test_draws_from_many_blocks_follow_the_distribution(V):
  logits = np.random.default_rng(V).normal(size=V).astype(np.float32) * 2
  tokens, logprobs = draw(logits, SamplingConfig())
  assert_drawn_from(np.bincount(tokens, minlength=V), truncated(logits))
  np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[tokens], rtol=1e-5, atol=1e-6)


def test_a_block_with_tokens_that_are_left_out_is_drawn_no_less_often():
  logits = np.full(2 * MOST_LANES, -np.inf, np.float32)
  logits[[0, 1, 2, 3, MOST_LANES]] = np.log([0.3, 0.1, 0.1, 0.1, 0.4])
  tokens, _ = draw(logits, SamplingConfig(top_p=0.65))
  assert_drawn_from(np.bincount(tokens, minlength=len(logits)), truncated(logits, top_p=0.65))


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
def test_large_logits_at_a_low_temperature(options):
  sampling = SamplingConfig(temperature=0.01, **options)
  tokens, logprobs = draw(100 * LOGITS, sampling)
  assert (tokens == LOGITS.argmax()).all() and np.abs(logprobs).max() < 1e-6


def test_more_may_be_kept_than_there_are():
  tokens, _ = draw(LOGITS, SamplingConfig(top_k=100, top_p=0.9))
  assert_drawn_from(np.bincount(tokens, minlength=len(LOGITS)), truncated(LOGITS, top_p=0.9))


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}], ids=str)
def test_a_row_without_numbers_ends_and_leaves_the_others_alone(options):
  logits = np.stack([LOGITS, np.full_like(LOGITS, np.nan), LOGITS])
  keys = jax.random.split(jax.random.key(0), 3)
  tokens, logprobs = sample(keys, logits, SamplingConfig(**options))
  others = [0, 2]
  alone, of_alone = sample(keys[np.array(others)], logits[others], SamplingConfig(**options))
  np.testing.assert_array_equal(tokens[np.array(others)], alone)
  np.testing.assert_array_equal(logprobs[np.array(others)], of_alone)


def test_temperature_zero_is_greedy():
  logits = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 6)
  tokens, logprobs = sample(keys, logits, SamplingConfig(temperature=0.0, top_p=0.5))
  np.testing.assert_array_equal(tokens, logits.argmax(-1))
  np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits).max(-1), rtol=1e-5)


def test_a_draw_depends_on_its_own_key_and_row():
  logits = np.random.default_rng(2).normal(size=(64, 8)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 64)
  sampling = SamplingConfig(top_p=0.95)
  tokens, logprobs = sample(keys, logits, sampling)
  order = np.random.default_rng(3).permutation(64)
  permuted = sample(keys[order], logits[order], sampling)
  np.testing.assert_array_equal(permuted[0], tokens[order])
  np.testing.assert_array_equal(permuted[1], logprobs[order])
  # One row among others than before, and another key.
  others = logits[::-1].copy()
  others[5] = logits[5]
  keys = jax.random.split(jax.random.key(9), 64).at[5].set(keys[5])
  changed, _ = sample(keys, others, sampling)
  assert changed[5] == tokens[5]
  assert (changed != tokens[::-1]).any()


@pytest.mark.parametrize("low", [-1e30, -np.inf, -104.0])
def test_a_token_without_mass_is_never_drawn(low):
  for likely in (0, 3, 7):
    logits = np.full(8, low, np.float32)
    logits[likely] = 0.0
    tokens, logprobs = draw(logits, SamplingConfig())
    assert (tokens == likely).all() and np.abs(logprobs).max() < 1e-6


def test_rounding_of_the_cumulative_sum_draws_no_token_without_mass(monkeypatch):
  """The sum is not flat, nor monotone, between tokens with mass.

  Both uniform numbers are set to those next to every value of the sum.
  """
  V, rng = 4096, np.random.default_rng(1)
  mass = np.zeros(V, np.float32)
  mass[rng.choice(V, 40, replace=False)] = np.exp(rng.normal(size=40))
  cdf = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(mass[None]))[0]
  assert (np.diff(cdf)[mass[1:] == 0] != 0).any(), "this case rounds nowhere"
  values = np.unique(cdf / cdf.max())
  grid = np.round(values * 2**23)[:, None] + np.arange(-4, 5)
  uniform = np.unique(np.clip(grid, 0, 2**23 - 1)) / 2**23
  monkeypatch.setattr(token, "MOST_LANES", V)  # one block
  rows = np.broadcast_to(np.where(mass > 0, np.log(np.maximum(mass, 1e-9)), -np.inf), (8, V))
  seen = set()
  draw_uniform = lambda index, shape: jnp.full(shape, jnp.asarray(uniform, jnp.float32)[index])
  monkeypatch.setattr(jax.random, "uniform", draw_uniform)
  for start in range(0, len(uniform) - 8, 8):
    # Not jitted: a compiled program would keep the patched function.
    tokens, _ = sample_token(start + jnp.arange(8), rows, SamplingConfig())
    assert (mass[tokens] > 0).all()
    seen |= set(np.asarray(tokens).tolist())
  assert len(seen) == 40
