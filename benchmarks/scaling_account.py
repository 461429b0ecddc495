"""One decode step of `benchmarks.scaling` and its parts, each a program of its own.

The parts are the functions that the step calls, at its shapes. Attention to the prefix has a suffix
of one slot, attention to the suffix a prefix of one; the step draws from a full suffix.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.peers import Model
from benchmarks.sampling import unending
from benchmarks.scaling_points import Point, random_prompts, roofline, spread
from benchmarks.timing import in_turn, overwriting
from spo_jax.infra.mesh import make_mesh
from spo_jax.models.attention import LayerCache, attend_decode, write_chunk
from spo_jax.models.decoder import DecoderConfig, cast_weights, forward, token_logits
from spo_jax.planning.minimum import Work, step_work
from spo_jax.planning.programs import Level
from spo_jax.sampling import stepping, verbs
from spo_jax.sampling.token import sample_token

WHOLE, SUM = "whole step", "sum of parts"


class Inputs(NamedTuple):
  """What a step at a full suffix begins with."""

  params: Any  # in the dtype of the activations
  prefix: verbs.Prefix
  state: stepping.State
  full: tuple
  last: tuple
  time: jax.Array


def account(
  model: Model, point: Point, repeats: int, rates: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
  """Seconds of the last level's step and of its parts, beside what each must do.

  Returns:
    By part, `whole step` and `sum of parts` the last.
  """
  cfg, level = model.cfg, point.levels()[-1]
  sampler = unending(cfg, make_mesh(1, 1, 1), level.rows)
  decode_cfg = dataclasses.replace(sampler.decode_config(level.budget, False), rows=None)
  prompts = random_prompts(cfg.vocab_size, level.rows, level.prefix)
  lengths = jnp.full((level.rows,), level.prefix, jnp.int32)
  # No part lies on a mesh, or a program's results would not be arguments that it takes.
  prefix = jax.device_put(sampler.prefill(model.params, prompts, lengths), jax.devices()[0])
  inputs = full_suffix(model, decode_cfg, level, prefix, prompts[:, -1])
  calls = {
    **part_calls(cfg, decode_cfg, inputs),
    WHOLE: whole_call(cfg, decode_cfg, inputs),
  }
  timed = in_turn(calls, repeats)
  least = step_work(cfg, model.params, level.rows, level.n, level.prefix - 1, level.budget)
  found = {}
  for name, one in timed.items():
    parts = least if name == WHOLE else {name: least[name]}
    found[name] = told(one.seconds, parts, rates) | {"first_s": one.first_s}
  of_parts = [statistics.median(timed[name].seconds) for name in least]
  return found | {SUM: {"seconds": {"median": sum(of_parts)}}}


def told(
  seconds: list[float], parts: Mapping[str, Work], rates: Mapping[str, float]
) -> dict[str, Any]:
  """Seconds of a program, beside what its parts must do."""
  roofline_s = max(roofline(parts, rates).values())
  return {
    "seconds": spread(seconds),
    "flops": sum(work.flops for work in parts.values()),
    "bytes": sum(work.accessed for work in parts.values()),
    "roofline_s": roofline_s,
    "efficiency": roofline_s / statistics.median(seconds),
  }


def full_suffix(
  model: Model, decode_cfg: stepping.DecodeConfig, level: Level, prefix: verbs.Prefix, fed
) -> Inputs:
  """Before the last step of a level; fed [E]."""
  cfg, E, n, S = model.cfg, level.rows, level.n, level.budget
  groups = verbs.Groups(
    row=None,
    starts=jnp.full((E, n), level.prefix, jnp.int32),
    limits=jnp.full((E, n), S, jnp.int32),
    fed=jnp.repeat(jnp.asarray(fed)[:, None], n, axis=1),
    keys=jax.random.split(jax.random.key(0), (E, n)),
  )
  state = stepping.enter(decode_cfg, groups)._replace(steps=jnp.full((E,), S - 1, jnp.int32))
  chunks = [stepping.empty_chunks(cfg, decode_cfg, E, n, size) for size in decode_cfg.chunks()]
  full = tuple(zip(*chunks[:-1], strict=True)) or ((),) * cfg.layers
  params = jax.jit(cast_weights, static_argnums=0)(cfg, model.params)
  return Inputs(params, prefix, state, full, chunks[-1], jnp.int32(S - 1))


def whole_call(
  cfg: DecoderConfig, decode_cfg: stepping.DecodeConfig, inputs: Inputs
) -> Callable[[int], Any]:
  """`stepping.decode_step`, again and again at the same place."""

  def step(changed, params, prefix, full, time):
    state, last = changed
    new, last = stepping.decode_step(
      cfg, decode_cfg, params, prefix, state, full, last, time, ring=False
    )
    return (new._replace(steps=state.steps), last), None

  changed = (inputs.state, inputs.last)
  return overwriting(step, changed, inputs.params, inputs.prefix, inputs.full, inputs.time)


def part_calls(
  cfg: DecoderConfig, decode_cfg: stepping.DecodeConfig, inputs: Inputs
) -> dict[str, Callable[[int], Any]]:
  """The parts by their names in `planning.minimum.step_work`."""
  params, prefix, state, full, last, time = inputs
  E, n = state.fed.shape
  B = E * n
  make = lambda number, *shape: jax.random.normal(jax.random.key(number), shape, cfg.dtype)
  q = make(0, B, 1, cfg.heads, cfg.head_dim)
  k, v = (make(number, B, 1, cfg.kv_heads, cfg.head_dim) for number in (1, 2))
  hidden = make(3, B, cfg.width)
  logits = jax.jit(token_logits, static_argnums=0)(cfg, params, hidden)
  positions = (state.starts - 1 + state.steps[:, None]).reshape(B, 1)
  longest = prefix.positions.shape[1] + decode_cfg.max_new_tokens
  one_slot = dataclasses.replace(decode_cfg, max_new_tokens=1)
  short_suffix = stepping.empty_chunks(cfg, one_slot, E, n, 1)
  short_prefix = verbs.Prefix(
    prefix.positions[:, :1],
    tuple((keys[..., :1], values[..., :1, :]) for keys, values in prefix.cache),
  )

  def blocks(params, fed):
    # Keys and values are results, or the compiler would leave their matrices out.
    keep = lambda q, k, v, positions, context, cache, spec: (q, (k, v))
    return forward(cfg, keep, params, fed.reshape(B, 1), positions, longest=longest)

  def attend(of_cfg, last, prefix, state, full, q, k, v):
    context = stepping.decode_context(of_cfg, prefix, state, full, last, time, ring=False)
    caches = map(LayerCache, prefix.cache, full, last)
    found = [
      attend_decode(q, k, v, positions, context, cache, cfg.attention_spec(cfg.layer_kind(layer)))
      for layer, cache in enumerate(caches)
    ]
    return tuple(last for _, last in found), [mixed for mixed, _ in found]

  def write(last, prefix, state, full, k, v):
    context = stepping.decode_context(decode_cfg, prefix, state, full, last, time, ring=False)
    column, row = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    return tuple(write_chunk(chunk, column, row, context) for chunk in last), None

  def draw(state, logits):
    return sample_token(stepping.step_keys(state), logits, decode_cfg.sampling)

  to_prefix, to_suffix = (functools.partial(attend, of_cfg) for of_cfg in (one_slot, decode_cfg))
  none = ((),) * cfg.layers
  return {
    "blocks": waiting(jax.jit(blocks), params, state.fed),
    "prefix": overwriting(to_prefix, short_suffix, prefix, state, none, q, k, v),
    "suffix": overwriting(to_suffix, last, short_prefix, state, full, q, k, v),
    "cache write": overwriting(write, last, prefix, state, full, k, v),
    "unembedding": waiting(
      jax.jit(lambda params, hidden: token_logits(cfg, params, hidden)), params, hidden
    ),
    "draw": waiting(jax.jit(draw), state, logits),
  }


def waiting(function: Callable[..., Any], *args) -> Callable[[int], Any]:
  """A call that is timed: with these arguments, until its results are there."""

  def call(_) -> None:
    jax.block_until_ready(function(*args))

  return call
