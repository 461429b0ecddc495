"""The optimiser step: exact accumulation, what is skipped, what `prepare` adds, learning."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.algorithms import masking
from spo_jax.training.objective import forest_logprobs
from spo_jax.training.packing import PackConfig, pack
from spo_jax.training.prepare import prepare
from spo_jax.training.step import (
  TrainState,
  compiled_step,
  init_state,
  supervised_step,
  train_step,
)
from tests.tiny import SGD, loss_config, optimizer_config, tiny_config, tiny_params
from tests.training.forests import (
  assert_trees_close,
  own_segments,
  segment_rows,
  segment_rows_loss,
  sequence_logprobs,
  tree_forest,
)

MODEL = tiny_config(layers=1)
T, BLOCK = 32, 8


LOSS = loss_config()
PLAIN_LOSS = loss_config(kl_coef=0.0, ratio_threshold=1e9)


def state_of(params, optimizer_cfg=SGD) -> TrainState:
  """A state of its own: the step donates it."""
  return init_state(jax.tree.map(jnp.copy, params), optimizer_cfg)


@pytest.fixture(scope="module")
def params():
  return tiny_params(MODEL)


@pytest.fixture(scope="module")
def ref_params():
  return jax.tree.map(lambda x: x * 1.1, tiny_params(MODEL))


def make_batch(*, rows=1, room=4, trees=4, seed=0):
  """(forest, advantages, trained, batch, counts) of trees of 29 tokens, each a row of its own."""
  rng = np.random.default_rng(seed)
  forest = tree_forest(rng, (2, 3), (4, 3), prompts=(3,) * trees)
  advantages = rng.standard_normal(len(forest.parent)).astype(np.float32)
  cfg = PackConfig(
    T, rows=rows, query_block=2 * BLOCK, key_block=BLOCK, key_blocks=4, min_micro_batches=room
  )
  batch, counts = pack(forest, advantages, own_segments(forest), cfg)
  return forest, advantages, own_segments(forest), jax.tree.map(jnp.asarray, batch), counts


def step(params, batch, start, count, *, model=MODEL, loss_cfg=LOSS, optimizer_cfg=SGD):
  return train_step(
    model,
    loss_cfg,
    optimizer_cfg,
    state_of(params, optimizer_cfg),
    batch,
    jnp.int32(start),
    jnp.int32(count),
  )


def same(a, b) -> bool:
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b)))


def test_prepare_masks_scales_and_scores_as_the_algorithm_functions_do(params, ref_params):
  *_, batch, counts = make_batch(trees=3)
  assert counts["micro_batches"] == 3
  prepared = prepare(MODEL, LOSS, ref_params, batch, jnp.int32(3))
  flat = lambda x: x.reshape(-1, T)
  mask = masking.probability_mask(flat(batch.old_logprobs), flat(batch.loss_mask), threshold=0.03)
  assert 0 < mask.sum() < batch.loss_mask.sum()
  np.testing.assert_array_equal(flat(prepared.loss_mask), mask)
  whitened = masking.whiten(
    flat(batch.advantages), mask, statistics_mask=mask, shift_mean=True, unbiased=True
  )
  np.testing.assert_allclose(flat(prepared.advantages), whitened, rtol=1e-5, atol=1e-6)
  trained = np.asarray(flat(prepared.advantages))[mask]
  np.testing.assert_allclose([trained.mean(), trained.std(ddof=1)], [0, 1], atol=1e-5)

  score = jax.jit(forest_logprobs, static_argnums=0, static_argnames=("temperature", "chunk"))
  for i in range(3):
    micro = jax.tree.map(lambda x: x[i], batch)  # noqa: B023
    want = score(MODEL, ref_params, micro, temperature=1.0, chunk=12)
    np.testing.assert_allclose(prepared.ref_logprobs[i], want, rtol=1e-5, atol=1e-5)
  assert not prepared.ref_logprobs[3].any()
  for name in ("tokens", "positions", "prev", "until", "old_logprobs", "key_blocks", "episodes"):
    assert same(getattr(prepared, name), getattr(batch, name)), name


def test_prepare_without_a_reference_policy_and_the_other_scalings(params):
  *_, batch, _ = make_batch()
  flat = lambda x: x.reshape(-1, T)
  cfg = loss_config(kl_coef=0.0, use_probability_mask=False, scaling="rescale")
  prepared = prepare(MODEL, cfg, None, batch, jnp.int32(4))
  want = masking.rescale(flat(batch.advantages), flat(batch.loss_mask), unbiased=True)
  np.testing.assert_allclose(flat(prepared.advantages), want, rtol=1e-5)
  assert same(prepared.loss_mask, batch.loss_mask) and not prepared.ref_logprobs.any()
  cfg = loss_config(kl_coef=0.0, scaling="none")
  assert same(prepare(MODEL, cfg, None, batch, jnp.int32(4)).advantages, batch.advantages)
  with pytest.raises(ValueError, match="unknown scaling 'unit', one of whiten, rescale, none"):
    prepare(MODEL, loss_config(scaling="unit"), params, batch, jnp.int32(4))


def test_accumulation_is_exact_and_equals_segment_rows(params):
  """Rows one by one, rows all at once, and (prefix, segment) rows: one loss, one gradient."""
  forest, advantages, trained, one_by_one, _ = make_batch(rows=1, room=4)
  *_, at_once, counts = make_batch(rows=4, room=1)
  assert (one_by_one.tokens.shape, at_once.tokens.shape) == ((4, 1, T), (1, 4, T))
  a, metrics_a = step(params, one_by_one, 0, 4, loss_cfg=PLAIN_LOSS)
  b, metrics_b = step(params, at_once, 0, 1, loss_cfg=PLAIN_LOSS)
  for name in metrics_a:
    np.testing.assert_allclose(metrics_a[name], metrics_b[name], rtol=1e-6, err_msg=name)
  change = lambda state: jax.tree.map(lambda new, old: new - old, state.params, params)
  assert_trees_close(a.params, b.params, 1e-6)

  loss, grads = segment_rows_loss(
    MODEL, params, segment_rows(forest, advantages, trained, (trained.sum(), 12))
  )
  np.testing.assert_allclose(metrics_a["loss"] * counts["tokens"], loss, rtol=1e-5)
  want = jax.tree.map(lambda g: -g / counts["tokens"], grads)
  assert_trees_close(change(a), want, 1e-5)
  norm = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics_a["grad_norm"] * counts["tokens"], norm, rtol=1e-5)
  assert (int(a.step), float(metrics_a["skipped"])) == (1, 0)


def test_metrics_and_kl_are_those_of_the_definitions(params, ref_params):
  *_, batch, _ = make_batch()
  batch = prepare(MODEL, LOSS, ref_params, batch, jnp.int32(4))
  _, metrics = step(params, batch, 0, 4)
  score = jax.jit(forest_logprobs, static_argnums=0, static_argnames=("temperature", "chunk"))
  logprobs = [
    score(MODEL, params, jax.tree.map(lambda x: x[i], batch), temperature=1.0, chunk=12)  # noqa: B023
    for i in range(4)
  ]
  mask = np.asarray(batch.loss_mask)
  new, old, ref, adv = (
    np.asarray(x, np.float64)[mask]
    for x in (jnp.stack(logprobs), batch.old_logprobs, batch.ref_logprobs, batch.advantages)
  )
  ratio = np.exp(new - old)
  clipped = np.clip(ratio, 0.8, 1.2) * adv
  kl = np.minimum(np.exp(ref - new) - (ref - new) - 1, 10)
  want = {
    "loss": -np.minimum(ratio * adv, clipped).mean() + 0.5 * kl.sum() / batch.episodes.sum(),
    "kl": kl.mean(),
    "policy_kl": (old - new).mean(),
    "clip_fraction": (clipped < ratio * adv).mean(),
    "ratio": ratio.mean(),
    "tokens": len(new),
    "skipped": 0,
    "unstable": 0,
  }
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
  assert metrics.keys() == want.keys() | {"grad_norm"}
  assert 0 < metrics["clip_fraction"] < 1


def test_a_step_reads_its_range_of_micro_batches_alone(params, ref_params):
  *_, batch, _ = make_batch()
  batch = prepare(MODEL, LOSS, ref_params, batch, jnp.int32(4))
  program = compiled_step(train_step, state_of(params, SGD))
  compiled = program._cache_size()
  middle, metrics = step(params, batch, 1, 2)
  rolled = jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), batch)
  first, want = step(params, rolled, 0, 2)
  assert same(middle, first) and same(metrics, want)
  poisoned = rolled._replace(
    advantages=rolled.advantages.at[2:].set(jnp.nan), tokens=rolled.tokens.at[2:].set(7)
  )
  assert same(step(params, poisoned, 0, 2)[0], first)
  parts = [step(params, batch, start, 1)[1] for start in range(4)]
  assert sum(float(part["tokens"]) for part in parts) == batch.loss_mask.sum()
  assert program._cache_size() <= compiled + 1


def test_batches_of_any_number_of_rows_share_one_program(params):
  batches = [make_batch(trees=trees)[-2:] for trees in (4, 1, 2)]
  step(params, batches[0][0], 0, 4, loss_cfg=PLAIN_LOSS)
  program = compiled_step(train_step, state_of(params, SGD))
  compiled = program._cache_size()
  for batch, counts in batches[1:]:
    used = counts["micro_batches"]
    state, metrics = step(params, batch, 0, used, loss_cfg=PLAIN_LOSS)
    assert metrics["tokens"] == counts["tokens"] and not metrics["skipped"]
    assert not same(state.params, params)
  assert program._cache_size() == compiled


def test_nothing_to_train_changes_nothing(params, ref_params):
  *_, batch, _ = make_batch()
  batch = prepare(MODEL, LOSS, ref_params, batch, jnp.int32(4))
  empty = batch._replace(
    loss_mask=jnp.zeros_like(batch.loss_mask), episodes=jnp.zeros_like(batch.episodes)
  )
  for given, count in ((empty, 4), (batch, 0)):
    state, metrics = step(params, given, 0, count)
    assert same(state, state_of(params))
    assert metrics["skipped"] == 1 and metrics["tokens"] == metrics["unstable"] == 0
    assert all(bool(jnp.isfinite(x)) for x in metrics.values())
  forest, advantages, trained, *_ = make_batch()
  nothing, counts = pack(
    forest,
    advantages,
    np.zeros_like(trained),
    PackConfig(
      T, rows=1, query_block=2 * BLOCK, key_block=BLOCK, key_blocks=4, min_micro_batches=4
    ),
  )
  prepared = prepare(MODEL, LOSS, ref_params, nothing, jnp.int32(counts["micro_batches"]))
  assert bool(jnp.isfinite(prepared.advantages).all())
  assert same(step(params, prepared, 0, 0)[0], state_of(params))


def test_without_tokens_adam_does_not_go_on_along_its_moments(params, ref_params):
  adam = optimizer_config(weight_decay=0.1)
  *_, batch, _ = make_batch()
  batch = prepare(MODEL, LOSS, ref_params, batch, jnp.int32(4))
  state, _ = step(params, batch, 0, 4, optimizer_cfg=adam)
  assert not same(state.params, params)
  want = jax.tree.map(np.array, state)  # a copy: the step donates
  empty = batch._replace(loss_mask=jnp.zeros_like(batch.loss_mask))
  for count in (4, 0):
    state, metrics = train_step(MODEL, LOSS, adam, state, empty, jnp.int32(0), jnp.int32(count))
    assert metrics["skipped"] == 1
    assert same(state, want)


def test_a_batch_far_off_policy_is_skipped(params, ref_params):
  *_, batch, _ = make_batch()
  batch = prepare(MODEL, LOSS, ref_params, batch, jnp.int32(4))
  state, metrics = step(params, batch._replace(old_logprobs=batch.old_logprobs - 4), 0, 4)
  assert metrics["ratio"] > 10 and metrics["skipped"] == metrics["unstable"] == 1
  assert same(state, state_of(params))
  _, metrics = step(params, batch, 0, 4)
  assert metrics["ratio"] < 10 and metrics["skipped"] == 0


@pytest.mark.parametrize("field", ["old_logprobs", "advantages"])
def test_what_is_not_a_number_does_not_reach_the_parameters(params, ref_params, field):
  *_, batch, _ = make_batch()
  batch = prepare(MODEL, LOSS, ref_params, batch, jnp.int32(4))
  state, metrics = step(params, batch._replace(**{field: getattr(batch, field) * jnp.nan}), 0, 4)
  assert metrics["skipped"] == 1
  assert same(state, state_of(params))


def test_bfloat16_activations_keep_float32_parameters_and_moments(params):
  *_, batch, _ = make_batch()
  _, want = step(params, batch, 0, 4, loss_cfg=PLAIN_LOSS)
  state, metrics = step(
    params, batch, 0, 4, model=dataclasses.replace(MODEL, dtype="bfloat16"), loss_cfg=PLAIN_LOSS
  )
  floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert len(floats) == 3 * len(jax.tree.leaves(params))
  assert {x.dtype for x in floats} == {jnp.dtype("float32")}
  for name in ("loss", "grad_norm", "ratio"):
    assert metrics[name] != want[name]
    np.testing.assert_allclose(metrics[name], want[name], rtol=0.05, err_msg=name)


def test_remat_changes_nothing(params):
  *_, batch, _ = make_batch()
  want, want_metrics = step(params, batch, 0, 4, loss_cfg=PLAIN_LOSS)
  state, metrics = step(
    params, batch, 0, 4, model=dataclasses.replace(MODEL, remat="blocks"), loss_cfg=PLAIN_LOSS
  )
  np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-6)
  np.testing.assert_allclose(metrics["grad_norm"], want_metrics["grad_norm"], rtol=1e-6)
  assert_trees_close(state.params, want.params, 1e-6)


def test_steps_raise_the_probability_of_good_segments_and_lower_that_of_bad_ones(params):
  *_, batch, _ = make_batch()
  score = jax.jit(
    jax.vmap(
      lambda params, micro: forest_logprobs(MODEL, params, micro, temperature=1.0, chunk=12),
      (None, 0),
    )
  )
  before = score(params, batch)
  batch = batch._replace(old_logprobs=before, advantages=0.01 * jnp.sign(batch.advantages))
  state, losses = state_of(params), []
  for _ in range(8):
    state, metrics = train_step(MODEL, PLAIN_LOSS, SGD, state, batch, jnp.int32(0), jnp.int32(4))
    losses.append(float(metrics["loss"]))
  assert int(state.step) == 8
  assert losses[-1] < losses[3] < losses[0]
  change = np.asarray(score(state.params, batch) - before)
  good, bad = (np.asarray(batch.loss_mask & (batch.advantages * sign > 0)) for sign in (1, -1))
  assert change[good].mean() > 0.05 > -0.05 > change[bad].mean()


def test_supervised_step_is_the_mean_negative_log_likelihood_and_learns(params):
  forest, advantages, trained, batch, _ = make_batch()
  rows = segment_rows(forest, advantages, trained, (trained.sum(), 12))
  logprobs = sequence_logprobs(MODEL, params, jnp.asarray(rows["tokens"]))
  want = -np.asarray(logprobs)[rows["loss_mask"][:, 1:]].mean()
  state, losses = state_of(params, SGD), []
  for _ in range(20):
    state, loss = supervised_step(MODEL, 12, SGD, state, batch, jnp.int32(4))
    losses.append(float(loss))
  np.testing.assert_allclose(losses[0], want, rtol=1e-5)
  assert losses[-1] < 0.9 * losses[0]
  assert int(state.step) == 20


def shapes_with(text: str, size: int) -> list[list[int]]:
  """Shapes in a lowered program that have an axis of this size."""
  shapes = [
    [int(n) for n in dims.rstrip("x").split("x")]
    for dims in set(re.findall(r"tensor<((?:\d+x)+)[a-z]", text))
  ]
  return [shape for shape in shapes if size in shape]


def test_no_array_holds_the_logits_of_a_whole_row():
  vocab = 1009
  model = dataclasses.replace(MODEL, vocab_size=vocab)
  *_, batch, _ = make_batch(rows=4, room=1)
  state = init_state(tiny_params(model), SGD)

  def largest(chunk):
    lowered = compiled_step(train_step, state).lower(
      model, loss_config(logprob_chunk=chunk), SGD, state, batch, jnp.int32(0), jnp.int32(1)
    )
    return max(np.prod(shape) for shape in shapes_with(lowered.as_text(), vocab))

  assert largest(8) == 4 * 8 * vocab
  assert largest(T) == 4 * T * vocab


def test_a_long_row_of_a_large_vocabulary_holds_nothing_quadratic():
  """Compiled at T = 32,768 and V = 151,936, the largest array is one chunk of logits.

  The largest of all, T x T or T x V, would have 1.1 or 5.0 billion numbers.
  """
  tokens, vocab, chunk, queries, keys = 32_768, 151_936, 128, 256, 128
  model = tiny_config(layers=1, vocab_size=vocab, attention="flash", remat="blocks")
  state = init_state(tiny_params(model), SGD)
  *_, small, _ = make_batch()
  shapes = {
    "until": (1, 1, tokens // keys, keys),
    "key_blocks": (1, 1, tokens // queries, tokens // keys),
    "episodes": (1,),
  }
  batch = type(small)(
    *(
      x if x is None else jax.ShapeDtypeStruct(shapes.get(name, (1, 1, tokens)), x.dtype)
      for name, x in zip(small._fields, small, strict=True)
    )
  )
  lowered = compiled_step(train_step, state).lower(
    model, loss_config(logprob_chunk=chunk), SGD, state, batch, jnp.int32(0), jnp.int32(1)
  )
  shapes = re.findall(r"(?:pred|[subf]+\d+)\[([\d,]+)\]", lowered.compile().as_text())
  largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
  assert largest == chunk * vocab


def test_the_ratio_bounds_ppo_alone(params):
  *_, batch, _ = make_batch()
  for kind, skipped in (("ppo_clip", 1), ("likelihood", 0)):
    cfg = loss_config(kind=kind, kl_coef=0.0, ratio_threshold=1e-3)
    _, metrics = step(params, batch, 0, 1, loss_cfg=cfg)
    assert metrics["skipped"] == skipped and metrics["ratio"] > 1e-3
