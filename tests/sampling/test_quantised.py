"""int8: what is reported is the distribution of a plain model with the same numbers as floats."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models.attention import attend_prefill
from spo_jax.models.decoder import LayerKind, forward, token_logits
from spo_jax.models.quantised import quantise
from spo_jax.models.rope import Rope
from spo_jax.sampling.sampler import jit_decode
from spo_jax.sampling.verbs import NO_GROUP, Groups
from tests.sampling.reference import assert_drawn_from
from tests.sampling.test_verbs import everything, make_groups, sequences
from tests.tiny import EOS, tiny_config, tiny_params, tiny_prompts, tiny_sampler

R, P, S = 8, 6, 8
KINDS = ("weights", "cache")
INT8 = ("int8", "int8")
ROPE = Rope(1e4, "exact")
CFG = tiny_config(layers=1, layer_kinds=(LayerKind(ROPE, window=4),), qkv_bias=True)
# Largest changes of a log-prob that weights and caches may make, in a model whose log-probs go down
# to -12.
BOUNDS = {"weights": 0.1, "cache": 0.1}
SUMMED = {"out": (0, 1)} | dict.fromkeys(("query", "key", "value", "gate", "up", "down"), 0)


def rounded(x, axes):
  """The nearest of 255 numbers, as many below 0 as above, to the largest along the axes."""
  step = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / 127
  return jnp.round(x / step) * step


def rounded_weights(cfg, params):
  """(the geometry of a decoder whose weights are rounded, its parameters)."""
  unembedding = params["embedding"].T if cfg.tie_embeddings else params["unembedding"]
  plain = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
  plain["unembedding"] = rounded(unembedding, 0)
  for name in params.keys() - plain.keys():
    block = params[name]
    plain[name] = block | {weight: rounded(block[weight], SUMMED[weight]) for weight in SUMMED}
  return dataclasses.replace(cfg, tie_embeddings=False), plain


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def plain_logprobs(cfg, params, tokens, prefilled, weights, cache, temperature):
  """[B, T, V] log-probs of what follows each of [B, T] tokens, by one plain causal pass.

  Keys and values of the `prefilled` [B] first tokens are those of the full weights.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  _, full = forward(cfg, attend_prefill, params, tokens, positions)

  def attend(q, k, v, positions, context, of_full, spec):
    first = (positions < prefilled[:, None])[..., None, None]
    k = jnp.where(first, of_full[0].transpose(0, 3, 1, 2), k)
    v = jnp.where(first, of_full[1].swapaxes(1, 2), v)
    if cache == "int8":
      k, v = rounded(k, -1), rounded(v, -1)
    return attend_prefill(q, k, v, positions, context, None, spec)

  if weights == "int8":
    cfg, params = rounded_weights(cfg, params)
  hidden, _ = forward(cfg, attend, params, tokens, positions, None, full)
  return jax.nn.log_softmax(token_logits(cfg, params, hidden) / temperature, axis=-1)


def gaps(cfg, params, kinds, seen, prefilled, groups, segments):
  """[drawn] differences of log-probs to those of the plain pass; `prefilled` [Q, n]."""
  tokens, lengths = sequences(seen, groups, segments)
  every = plain_logprobs(cfg, params, tokens, prefilled.reshape(-1), *kinds, 1.0)
  starts = np.asarray(groups.starts).reshape(-1)
  drawn = [(i, at) for i, end in enumerate(lengths) for at in range(starts[i], end)]
  row, at = np.transpose(drawn)
  reported = np.asarray(segments.logprobs).reshape(len(tokens), -1)[row, at - starts[row]]
  return np.abs(np.asarray(every)[row, at - 1, tokens[row, at]] - reported)


def grown(cfg, kinds, **options):
  """(params, [what `gaps` takes] for two levels): a prefill, a decode, an extension, a decode."""
  params, prompts = tiny_params(cfg), tiny_prompts(R, longest=P)
  sampler = dataclasses.replace(
    tiny_sampler(cfg, **options), **dict(zip(KINDS, kinds, strict=True))
  )
  prefix = sampler.prefill(params, prompts.tokens, prompts.lengths)
  groups = make_groups(prompts.tokens, prompts.lengths)
  decode = functools.partial(sampler.decode, params, max_new_tokens=S, keep_cache=True)
  segments = decode(prefix, groups)
  levels = [(prompts.tokens, groups.starts - 1, groups, segments)]
  extended = sampler.extend(prefix, groups, segments, everything(groups))
  tokens, lengths = sequences(prompts.tokens, groups, segments)
  drew = np.flatnonzero(np.asarray(segments.lengths).reshape(-1) > 0)
  deeper = make_groups(tokens[drew], lengths[drew], seed=1)
  above = drew[deeper.row]
  deeper = deeper._replace(row=np.where(deeper.row >= 0, above, NO_GROUP))
  prefilled = np.minimum(groups.starts.reshape(-1)[above][:, None], deeper.starts) - 1
  levels.append((tokens, prefilled, deeper, decode(extended, deeper)))
  return params, levels


@pytest.mark.parametrize(
  ("kinds", "options"),
  [
    (INT8, {"suffix_chunks": 3}),
    (INT8, {"slots": 3}),
    (("full", "int8"), {}),
  ],
  ids=str,
)
def test_logprobs_are_those_of_the_rounded_model(kinds, options):
  params, levels = grown(CFG, kinds, **options)
  for level in levels:
    assert gaps(CFG, params, kinds, *level).max() < 1e-4
  change = gaps(CFG, params, ("full", "full"), *levels[0]).max()
  bound = sum(BOUNDS[name] for name, kind in zip(KINDS, kinds, strict=True) if kind == "int8")
  assert bound / 10 < change < bound


def test_nothing_is_no_number():
  zeros = quantise(jnp.zeros((2, 3)), 0)
  assert not zeros.ints.any() and not zeros.scales.any()
  ints, scales = quantise(jnp.array([[1.0, -2.0], [0.5, 4.0]]), -1)
  assert (ints.tolist(), ints.dtype) == ([[64, -127], [16, 127]], jnp.int8)
  np.testing.assert_allclose(scales, [[2 / 127], [4 / 127]], rtol=1e-6)


def test_steps_read_int8():
  """The loop carries weights and caches as they are, not as floats made before it."""
  cfg = tiny_config(layers=1, width=20, ffn=36)
  sampler = dataclasses.replace(tiny_sampler(cfg), weights="int8", cache="int8")
  prompts = tiny_prompts(R, longest=P)
  params = tiny_params(cfg)
  prefix = sampler.prefill(params, prompts.tokens, prompts.lengths)
  groups = make_groups(prompts.tokens, prompts.lengths)
  lowered = jit_decode.lower(cfg, sampler.decode_config(S, False), params, prefix, groups)
  loops = re.findall(r"= \((.*)\) while\(", lowered.compile().as_text())
  loops = [loop for loop in loops if "s8[" in loop]
  assert len(loops) == len(sampler.decode_config(S, False).chunks())
  for shape in ("20,36", "36,20", "20,32", "8,2,8,6", "8,2,6,8"):  # matrices, keys, values
    assert all(f"s8[{shape}]" in loop and f"f32[{shape}]" not in loop for loop in loops)


def test_two_tokens_follow_the_distribution_of_the_rounded_model():
  """The embedding is the unembedding; many keys from one prompt, against enumeration."""
  V, groups, n = 8, 32, 64
  cfg = tiny_config(layers=1, tie_embeddings=True, vocab_size=V)
  params = tiny_params(cfg)
  params["embedding"] *= 0.3
  prompt = np.array([[3, 5, 2, 7]], np.int32)
  sampler = tiny_sampler(cfg, slots=8, temperature=0.7)
  sampler = dataclasses.replace(sampler, **dict(zip(KINDS, INT8, strict=True)))
  prefix = sampler.prefill(params, prompt, np.array([4], np.int32))
  asked = Groups(
    row=np.zeros(groups, np.int32),
    starts=np.full((groups, n), 4, np.int32),
    limits=np.full((groups, n), 2, np.int32),
    fed=np.full((groups, n), prompt[0, -1]),
    keys=jax.random.split(jax.random.key(5), (groups, n)),
  )
  segments = sampler.decode(params, prefix, asked, max_new_tokens=2, keep_cache=False)
  first, second = np.moveaxis(np.asarray(segments.tokens), -1, 0)
  second = np.where(np.asarray(segments.lengths) == 1, 0, second)
  following = np.append(prompt.repeat(V, 0), np.arange(V, dtype=np.int32)[:, None], axis=1)
  logprobs = np.asarray(plain_logprobs(cfg, params, following, np.full(V, 3), *INT8, 0.7))
  exact = np.exp(logprobs[:, 3].diagonal()[:, None] + logprobs[:, 4])
  exact[EOS] = 0
  exact[EOS, 0] = np.exp(logprobs[EOS, 3, EOS])
  np.testing.assert_allclose(exact.sum(), 1, rtol=1e-5)
  assert (exact * groups * n >= 5).sum() > 40, "too few outcomes to tell"
  counts = np.zeros((V, V))
  np.add.at(counts, (first, second), 1)
  assert_drawn_from(counts, exact)
  reported = np.exp(np.asarray(segments.logprobs).sum(-1, where=second[..., None] > 0))
  whole = second > 0
  np.testing.assert_allclose(reported[whole], exact[first[whole], second[whole]], rtol=1e-3)
