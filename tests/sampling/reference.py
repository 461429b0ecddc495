"""Plain oracles of the sampler's tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from spo_jax.models.attention import attend_prefill
from spo_jax.models.decoder import forward, token_logits


def truncated(logits, *, temperature=1.0, top_k=0, top_p=1.0):
  """The distribution [V] that tokens are drawn from, by a walk down the ranks."""
  mass = np.exp((logits - np.max(logits)) / temperature)
  mass /= mass.sum()
  ranked = sorted(range(len(mass)), key=lambda token: (-mass[token], token))
  ranked = ranked[: top_k or None]
  total, reached, kept = mass[ranked].sum(), 0.0, np.zeros_like(mass)
  for token in ranked:
    if reached >= top_p * total:
      break
    kept[token] = mass[token]
    reached += mass[token]
  return kept / kept.sum()


def assert_drawn_from(counts, probabilities, *, level=1e-3):
  """Chi-square test of counts. Rare outcomes are pooled; impossible ones must not occur."""
  counts, expected = np.ravel(counts), np.ravel(probabilities) * np.sum(counts)
  assert not counts[expected == 0].any()
  common, rare = expected >= 5, (expected > 0) & (expected < 5)
  if rare.any():
    counts = np.append(counts[common], counts[rare].sum())
    expected = np.append(expected[common], expected[rare].sum())
  else:
    counts, expected = counts[common], expected[common]
  if len(counts) == 1:  # nothing else could occur
    return
  p = stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue
  assert p > level, (p, counts, expected)


@functools.partial(jax.jit, static_argnums=0)
def causal_logprobs(cfg, params, tokens, temperature=1.0):
  """[B, T] tokens -> [B, T, V] log-probs of what follows each, by one plain causal pass."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  hidden, _ = forward(cfg, attend_prefill, params, tokens, positions)
  return jax.nn.log_softmax(token_logits(cfg, params, hidden) / temperature, axis=-1)
