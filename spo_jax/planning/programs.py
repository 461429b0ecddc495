"""The compiled programs of a run, lowered from shapes and shardings alone: no array is made.

They are the very functions that the run jits, with the static arguments that it gives them. The
supervised warm start and the greedy evaluation are left out: both are smaller than what is here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spo_jax.config import Config
from spo_jax.infra.mesh import PACKED_ROWS, param_shardings, row_sharding, row_shards
from spo_jax.learner import loss_config, most_pairs, needs_reference, pack_config
from spo_jax.models.attention import stored
from spo_jax.models.decode_weights import decode_weights
from spo_jax.models.decoder import DecoderConfig, init_params
from spo_jax.run import make_sampler
from spo_jax.sampling import stepping, verbs
from spo_jax.sampling.sampler import Sampler, jit_decode, jit_extend, jit_prefill
from spo_jax.training.objective import VALUE_HEAD
from spo_jax.training.packing import PackConfig, PackedForest
from spo_jax.training.prepare import prepare
from spo_jax.training.step import (
  TrainState,
  compiled_step,
  critic_step,
  new_state,
  state_shardings,
  train_step,
)
from spo_jax.training.weights import has_weights

STOP_IDS = (0,)  # stands for those of the tokenizer: memory does not depend on them


@dataclasses.dataclass(frozen=True)
class Setup:
  """What the programs are compiled for."""

  config: Config
  model: DecoderConfig
  mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Program:
  """A program, and what lies on the chips beside its arguments while it runs."""

  name: str
  phase: str  # "update", "sampling" or "evaluation"
  lower: Callable[[], jax.stages.Lowered]
  beside: Any  # a pytree of shapes with shardings
  # Compiled with all layers even where others are with few: it takes no longer, or not much, and a
  # line would mislead.
  whole: bool = False

  @property
  def path(self) -> str:
    """What the user calls it."""
    return f"{self.phase}/{self.name}"


def abstract_params(setup: Setup):
  """Shapes and shardings of the parameters."""
  boxed = jax.eval_shape(lambda: init_params(setup.model, jax.random.key(0)))
  return _placed(nn.unbox(boxed), param_shardings(setup.mesh, boxed))


def abstract_state(setup: Setup) -> TrainState:
  """Shapes and shardings of what the optimiser changes."""
  params, optimizer = abstract_params(setup), setup.config.optimizer
  if setup.config.critic.trunk == "shared":
    params = _with_value_head(setup, params)
  shapes = jax.eval_shape(lambda p: new_state(p, optimizer), params)
  return _placed(shapes, state_shardings(params, optimizer))


def _placed(shapes, shardings):
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, shapes, shardings)


def _in_rows(setup: Setup, tree):
  """Shapes that are split over their first axis."""
  return _placed(tree, jax.tree.map(lambda _: row_sharding(setup.mesh), tree))


def abstract_critic(setup: Setup) -> TrainState | None:
  """Shapes and shardings of a critic of its own."""
  if setup.config.critic.trunk != "own":
    return None
  params, optimizer = _with_value_head(setup, abstract_params(setup)), setup.config.critic_optimizer
  shapes = jax.eval_shape(lambda p: new_state(p, optimizer), params)
  return _placed(shapes, state_shardings(params, optimizer))


def _with_value_head(setup: Setup, params):
  whole = NamedSharding(setup.mesh, PartitionSpec())
  head = jax.ShapeDtypeStruct((setup.model.width,), jnp.float32, sharding=whole)
  return params | {VALUE_HEAD: head}


def abstract_batch(cfg: PackConfig, config: Config, mesh: Mesh) -> PackedForest:
  """Shapes and shardings of `packing.pack`'s batch, as `shard_batch` places it."""
  M, B, T = cfg.min_micro_batches, cfg.rows, cfg.row_length
  R = cfg.loss_length or T
  pairs = config.loss.kind == "dpo_positive"
  J, N = T // cfg.key_block, T // cfg.query_block

  def array(dtype, *shape):
    spec = PartitionSpec(None, PACKED_ROWS) if len(shape) > 1 else PartitionSpec()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  return PackedForest(
    tokens=array(jnp.int32, M, B, T),
    positions=array(jnp.int32, M, B, T),
    until=array(jnp.int32, M, B, J, cfg.key_block),
    key_blocks=array(jnp.int32, M, B, N, cfg.key_blocks),
    targets=array(jnp.int32, M, B, R),
    prev=array(jnp.int32, M, B, R),
    loss_mask=array(jnp.bool, M, B, R),
    advantages=array(jnp.float32, M, B, R),
    old_logprobs=array(jnp.float32, M, B, R),
    ref_logprobs=array(jnp.float32, M, B, R),
    episodes=array(jnp.float32, M),
    weights=array(jnp.float32, M, B, R) if has_weights(config) else None,
    sequence=array(jnp.int32, M, B, R) if pairs else None,
    pairs=array(jnp.int32, M, most_pairs(config), 2) if pairs else None,
  )


def prepared_batch(setup: Setup, batch: PackedForest) -> PackedForest:
  """Shapes and shardings of what `prepare` makes of a batch."""
  targets, loss = batch.targets, setup.config.loss
  like = lambda dtype, *more: jax.ShapeDtypeStruct(
    (*targets.shape, *more), dtype, sharding=targets.sharding
  )
  if loss.importance_cap:
    batch = batch._replace(sampler_logprobs=like(jnp.float32))
  if loss.forward_kl_coef:
    batch = batch._replace(ref_hidden=like(setup.model.dtype, setup.model.width))
  if setup.config.critic.trunk != "none":
    values = dict.fromkeys(("values", "returns"), like(jnp.float32))
    batch = batch._replace(**values, value_mask=like(jnp.bool))
  return batch


def update_programs(setup: Setup) -> Iterator[Program]:
  """`prepare`, `train_step` and, with a critic of its own, `critic_step`."""
  config, loss_cfg = setup.config, loss_config(setup.config)
  state, critic, reference = abstract_state(setup), abstract_critic(setup), _reference(setup)
  read = reference if loss_cfg.needs_reference else None
  of_critic = state if config.critic.trunk == "shared" else critic
  batch = abstract_batch(pack_config(config), config, setup.mesh)
  prepared = prepared_batch(setup, batch)
  count = jax.ShapeDtypeStruct((), jnp.int32)
  coef = jax.ShapeDtypeStruct((), jnp.float32) if config.loss.kl_control == "adaptive" else None
  yield Program(
    "prepare",
    "update",
    lambda: prepare.lower(
      setup.model,
      loss_cfg,
      read,
      batch,
      count,
      critic_params=None if of_critic is None else of_critic.params,
      kl_coef=coef,
      params=state.params if loss_cfg.importance_cap else None,
    ),
    beside=state if critic is None else (state, critic.opt_state),
    whole=setup.model.scan_layers,
  )
  step = compiled_step(train_step, state)
  forward_kl = reference if config.loss.forward_kl_coef else None
  yield Program(
    "train_step",
    "update",
    lambda: step.lower(
      setup.model, loss_cfg, config.optimizer, state, prepared, count, count, coef, forward_kl
    ),
    beside=reference if critic is None else (reference, critic),
    whole=setup.model.scan_layers,
  )
  if critic is not None:
    value_step = compiled_step(critic_step, critic)
    yield Program(
      "critic_step",
      "update",
      lambda: value_step.lower(
        setup.model, loss_cfg, config.critic_optimizer, critic, prepared, count, count
      ),
      beside=(reference, state),
      whole=setup.model.scan_layers,
    )


def sampling_programs(setup: Setup) -> Iterator[Program]:
  """The verbs of `strategies.grow_tree` or `grow_chain`, in the order in which they run."""
  rollout = setup.config.rollout
  sampler = _sampler(setup, as_rollout=True)
  yield _prefill(setup, sampler, "sampling", setup.config.part_prompts, rollout.max_prompt_tokens)
  for label, level in decoded_levels(setup.config):
    yield _decode(setup, sampler, "sampling", "decode" + label, level)
    if level.keep_cache:
      yield _extend(setup, sampler, level, label if rollout.strategy != "chain" else "")


@dataclasses.dataclass(frozen=True)
class Level:
  """A call of `decode`: n continuations of each of R prefixes of P tokens."""

  rows: int
  n: int
  prefix: int
  budget: int
  keep_cache: bool
  any_rows: bool = False  # groups continue any prefixes, not each its own


def decoded_levels(config: Config) -> list[tuple[str, Level]]:
  """The calls of `decode` of a part of an iteration in their order, each with a label."""
  rollout, prompt = config.rollout, config.rollout.max_prompt_tokens
  if rollout.strategy == "chain":
    n, longest = rollout.samples, rollout.max_response_tokens
    probes = rollout.cuts_per_group * rollout.probes
    chain = Level(config.part_prompts, n, prompt, longest, keep_cache=True)
    trajectories = config.part_prompts * n
    probing = Level(trajectories, probes, prompt + longest, longest, False, any_rows=True)
    return [("", chain), (" probes", probing)]
  depth, levels = len(config.branches), []
  for i, (n, budget) in enumerate(zip(config.branches, config.budgets, strict=True)):
    rows = config.part_prompts * math.prod(config.branches[:i])
    level = Level(rows, n, prompt + sum(config.budgets[:i]), budget, keep_cache=i < depth - 1)
    levels.append((f" level {i + 1}" if depth > 1 else "", level))
  return levels


def decode_step(setup: Setup) -> Program:
  """Steps of the last and largest call of `decode`, at a full suffix: a loop, as there.

  A part of that program, for its cost: in a loop the compiler lays caches out for all its turns,
  not as they come and go. Compiled with all layers, since caches of few would stay in the core.
  """
  _, level = decoded_levels(setup.config)[-1]
  decode_cfg = _sampler(setup, as_rollout=True).decode_config(level.budget, level.keep_cache)
  cfg = setup.model.for_decode()
  E, ring = decoded_at_once(setup.config, level), decoded_in_ring(setup.config, level)
  sizes = [level.budget] if ring else decode_cfg.chunks()
  groups = _groups(setup, E, level.n, False)
  state = jax.eval_shape(lambda groups: stepping.enter(decode_cfg, groups), groups)
  empty = lambda size: stepping.empty_chunks(cfg, decode_cfg, E, level.n, size)
  chunks = [_in_rows(setup, jax.eval_shape(lambda size=size: empty(size))) for size in sizes]
  full = tuple(zip(*chunks[:-1], strict=True)) or ((),) * cfg.layers

  def steps(params, prefix, state, full, last, time, end):
    def step(carry):
      state, last, time = carry
      state, last = stepping.decode_step(
        cfg, decode_cfg, params, prefix, state, full, last, time, ring=ring
      )
      return state, last, time + 1

    return jax.lax.while_loop(lambda carry: carry[2] < end, step, (state, last, time))

  count = jax.ShapeDtypeStruct((), jnp.int32)
  return Program(
    "decode step",
    "sampling",
    lambda: jax.jit(steps, donate_argnums=(2, 4)).lower(
      _decode_weights(setup, decode_cfg.weights),
      _prefix(setup, E, level.prefix, decode_cfg.cache),
      _in_rows(setup, state),
      full,
      chunks[-1],
      count,
      count,
    ),
    beside=(),
    whole=True,
  )


def _decode_weights(setup: Setup, kind: str):
  """Shapes and shardings of the weights that steps multiply."""
  params = abstract_params(setup)
  cfg = setup.model.for_decode()
  make = lambda params: decode_weights(cfg, params, kind)
  if kind == "full" and cfg.spread is None:
    shardings = jax.tree.map(lambda x: x.sharding, params)
  else:  # those of the scales are the compiler's
    shardings = jax.jit(make).lower(params).compile().output_shardings
  return _placed(jax.eval_shape(make, params), shardings)


def decoded_at_once(config: Config, level: Level) -> int:
  """Groups that are decoded at a time."""
  return min(config.rollout.slots, level.rows)


def decoded_in_ring(config: Config, level: Level) -> bool:
  """Whether waiting groups enter one by one, so that `decode` has one ring and no chunks."""
  return config.rollout.slots < level.rows and config.rollout.refill_share < 1


def evaluation_programs(setup: Setup) -> Iterator[Program]:
  """The verbs of `evaluation.respond`."""
  config, shards = setup.config, row_shards(setup.mesh)
  batch = min(config.eval.batch, -(-config.eval.prompts // shards) * shards)
  sampler = _sampler(setup, as_rollout=False)
  prompt = config.rollout.max_prompt_tokens
  yield _prefill(setup, sampler, "evaluation", batch, prompt)
  level = Level(batch, 1, prompt, config.rollout.max_response_tokens, keep_cache=False)
  yield _decode(setup, sampler, "evaluation", "decode", level)


KINDS = (update_programs, sampling_programs, evaluation_programs)


def _sampler(setup: Setup, as_rollout: bool) -> Sampler:
  rollout = setup.config.rollout
  return make_sampler(
    rollout,
    setup.model,
    setup.mesh,
    STOP_IDS,
    temperature=rollout.temperature,
    as_rollout=as_rollout,
  )


def _prefill(setup: Setup, sampler: Sampler, phase: str, rows: int, prompt: int) -> Program:
  state = abstract_state(setup)
  prompts = (
    jax.ShapeDtypeStruct((rows, prompt), jnp.int32),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
  )
  return Program(
    "prefill",
    phase,
    lambda: jit_prefill.lower(
      setup.model,
      row_sharding(setup.mesh),
      sampler.prefill_chunk,
      sampler.cache,
      state.params,
      *_in_rows(setup, prompts),
    ),
    beside=(state.opt_state, _reference(setup)),
  )


def _decode(setup: Setup, sampler: Sampler, phase: str, name: str, level: Level) -> Program:
  state = abstract_state(setup)
  decode_cfg = sampler.decode_config(level.budget, level.keep_cache)
  prefix = _prefix(setup, level.rows, level.prefix, decode_cfg.cache)
  return Program(
    name,
    phase,
    lambda: jit_decode.lower(
      setup.model,
      decode_cfg,
      state.params,
      prefix,
      _groups(setup, level.rows, level.n, level.any_rows),
    ),
    beside=(state.opt_state, _reference(setup)),
  )


def _extend(setup: Setup, sampler: Sampler, level: Level, label: str = "") -> Program:
  decode_cfg = sampler.decode_config(level.budget, level.keep_cache)
  empty = lambda: stepping.empty_segments(setup.model, decode_cfg, level.rows, level.n)
  index = jax.ShapeDtypeStruct((level.rows * level.n,), jnp.int32)
  return Program(
    "extend" + label,
    "sampling",
    lambda: jit_extend.lower(
      row_sharding(setup.mesh),
      _prefix(setup, level.rows, level.prefix, decode_cfg.cache),
      _groups(setup, level.rows, level.n, level.any_rows),
      *_in_rows(setup, (jax.eval_shape(empty), index)),
    ),
    beside=(abstract_state(setup), _reference(setup)),
    whole=True,  # its layers take turns with one buffer, which two of them do not fill
  )


def _reference(setup: Setup):
  return abstract_params(setup) if needs_reference(setup.config) else None


def _prefix(setup: Setup, rows: int, tokens: int, kind: str) -> verbs.Prefix:
  """Prefixes with their caches, split by rows alone."""
  model = setup.model
  keys = jax.ShapeDtypeStruct((rows, model.kv_heads, model.head_dim, tokens), model.dtype)
  values = jax.ShapeDtypeStruct((rows, model.kv_heads, tokens, model.head_dim), model.dtype)
  prefix = verbs.Prefix(
    positions=jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
    cache=(jax.eval_shape(functools.partial(stored, kind), keys, values),) * model.layers,
  )
  return _in_rows(setup, prefix)


def _groups(setup: Setup, rows: int, n: int, any_rows: bool) -> verbs.Groups:
  key = jax.eval_shape(lambda: jax.random.key(0)).dtype
  groups = verbs.Groups(
    row=jax.ShapeDtypeStruct((rows,), jnp.int32) if any_rows else None,
    starts=jax.ShapeDtypeStruct((rows, n), jnp.int32),
    limits=jax.ShapeDtypeStruct((rows, n), jnp.int32),
    fed=jax.ShapeDtypeStruct((rows, n), jnp.int32),
    keys=jax.ShapeDtypeStruct((rows, n), key),
  )
  return _in_rows(setup, groups)
