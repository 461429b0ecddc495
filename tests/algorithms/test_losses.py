import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.algorithms import kl, losses, masking
from spo_jax.algorithms.logprobs import token_logprobs
from tests.algorithms import reference

SHAPE = (8, 30)
VOCAB = 9
HYPER = [
  "cliprange", "ratio_threshold", "kl_coef", "kl_penalty_loss_clip_min",
  "kl_penalty_loss_clip_max", "forward_kl_penalty_coef", "forward_kl_penalty_clip_min",
  "forward_kl_penalty_clip_max",
]  # fmt: skip
CLIP = dict(epsilon_low=0.2, epsilon_high=0.2, log_ratio_bound=10.0)
_token_logprobs = jax.jit(token_logprobs, static_argnames="chunk")


@functools.partial(jax.jit, static_argnames="estimator")
def _actor_loss(arrays, *, estimator, use_prob_mask, hyper):
  action, old = arrays["action_mask"], arrays["old_logprobs"]
  likely = masking.probability_mask(old, action, threshold=0.9)
  mask = jnp.where(use_prob_mask, likely, action)

  def loss(logprobs, logits):
    return reference.actor_loss(
      logprobs,
      old,
      arrays["advantages"],
      mask,
      arrays["ref_logprobs"],
      logits,
      arrays["ref_all_tokens_logps"],
      estimator=estimator,
      hyper=hyper,
    )

  inputs = arrays["new_logprobs"], arrays["all_tokens_logps"]
  value, grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*inputs)
  keep = lambda x: jnp.where(mask, x, 0)
  divergence = kl.KL_ESTIMATORS[estimator](keep(inputs[0]), keep(arrays["ref_logprobs"]))
  bounds = hyper["kl_penalty_loss_clip_min"], hyper["kl_penalty_loss_clip_max"]
  return value, grads, kl.clip(divergence, *bounds)


def test_actor_losses_of_the_reference(fixture_arrays):
  data = fixture_arrays("actor_loss")
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=3e-6)
  for case in reference.load_json("actor_loss"):
    key, name = case["case"] + "__", case["name"]
    given = {k.removeprefix(key): v for k, v in data.items() if k.startswith(key)}
    rows, length = given["action_mask"].shape
    whole = (slice(0, rows), slice(0, length))
    arrays = {
      field: reference.padded(given.get(field, np.zeros((rows, length), np.float32)), *SHAPE)
      for field in ("old_logprobs", "new_logprobs", "advantages", "ref_logprobs")
    }
    arrays["action_mask"] = reference.padded(given["action_mask"] > 0, *SHAPE)
    for field in ("all_tokens_logps", "ref_all_tokens_logps"):
      flat = given.get(field, np.zeros((rows, length, VOCAB), np.float32))
      arrays[field] = reference.padded(flat, *SHAPE, VOCAB)

    (loss, metrics), (grad, all_grad), divergence = _actor_loss(
      arrays,
      estimator=case["kl_penalty_loss_type"] or "control_variate",
      use_prob_mask=case["use_prob_mask"],
      hyper={field: float(case[field]) for field in HYPER} | {"num_rows": float(rows)},
    )
    assert metrics["count"] == case["num_tokens_in_loss"], name
    assert metrics["skipped"] == case["is_skipped"], name
    if name == "prob_mask_empty_gives_nan":
      assert np.isnan(given["loss"]) and loss == 0
      np.testing.assert_array_equal(grad, 0)
      np.testing.assert_array_equal([metrics[field] for field in case["metrics"]], 0)
      continue
    close(loss, given["loss"], err_msg=name)
    close(grad[whole], given["grad_new_logprobs"], err_msg=name)
    for field, want in case["metrics"].items():
      close(metrics[field], want, err_msg=f"{name} {field}")
    if "ref_kl" in given:
      close(divergence[whole], given["ref_kl"], err_msg=name)
    if "grad_all_tokens_logps" in given:
      # The reference's gradient stops at the log-probabilities, which are our logits here.
      want = given["grad_all_tokens_logps"]
      shares = np.exp(given["all_tokens_logps"]) * want.sum(axis=-1, keepdims=True)
      close(all_grad[whole], want - shares, err_msg=name)
    np.testing.assert_array_equal(grad[rows:], 0)


def _random_batch(seed=0, shape=(3, 7)):
  rng = np.random.default_rng(seed)
  logprobs = np.log(rng.uniform(0.1, 1, shape)).astype(np.float32)
  old = (logprobs + rng.normal(0, 0.3, shape)).astype(np.float32)
  return logprobs, old, rng.normal(size=shape).astype(np.float32), rng.random(shape) < 0.6


def test_nothing_outside_the_mask_matters():
  logprobs, old, adv, mask = _random_batch()
  kl_hyper = dict(estimator="seq_control_variate", clip_min=0.0, clip_max=1e9)
  for fn in (
    lambda lp, o, a: losses.ppo_clip(lp, o, a, mask, **CLIP),
    lambda lp, o, a: (losses.kl_loss(lp, o, mask, **kl_hyper),),
    lambda lp, o, a: losses.nll(lp, mask),
  ):
    run = jax.jit(jax.value_and_grad(lambda *x, fn=fn: (fn(*x)[0], fn(*x)), has_aux=True))
    clean = run(logprobs, old, adv)
    assert np.any(clean[1][mask] != 0)
    np.testing.assert_array_equal(clean[1][~mask], 0)
    for junk in [(0, -1e9, 7), (np.nan,) * 3, (-np.inf, -np.inf, np.inf)]:
      dirty = [
        np.where(mask, x, np.float32(value))
        for x, value in zip((logprobs, old, adv), junk, strict=True)
      ]
      jax.tree.map(np.testing.assert_array_equal, run(*dirty), clean)


def test_an_empty_mask_gives_zero_loss_and_gradient():
  logprobs, old, adv, mask = _random_batch()
  none = np.zeros_like(mask)
  loss = lambda lp: losses.ppo_clip(lp, old, adv, none, **CLIP).loss
  assert loss(logprobs) == 0
  np.testing.assert_array_equal(jax.grad(loss)(logprobs), 0)
  np.testing.assert_array_equal(losses.ppo_clip(logprobs, old, adv, none, **CLIP), np.zeros(6))


def test_clip_range_is_asymmetric():
  """A positive advantage is clipped above 1 + epsilon_high, a negative below 1 - epsilon_low."""
  ratios = np.array([[1.15, 1.25, 0.75, 0.85]], np.float32)
  logprobs, old, mask = np.log(ratios), np.zeros_like(ratios), np.ones_like(ratios, bool)
  hyper = dict(epsilon_low=0.1, epsilon_high=0.2, log_ratio_bound=10.0)
  for sign, clipped in ((1.0, [0, 1, 0, 0]), (-1.0, [0, 0, 1, 1])):
    advantages = np.full_like(ratios, sign)
    sums = losses.ppo_clip(logprobs, old, advantages, mask, **hyper)
    assert sums.clipped == sum(clipped)
    grad = jax.grad(lambda lp, a=advantages: losses.ppo_clip(lp, old, a, mask, **hyper).loss)
    np.testing.assert_allclose(
      grad(logprobs), -sign * ratios * (1 - np.array([clipped])), rtol=1e-5
    )


def test_sums_of_micro_batches_add_up():
  """Rows one at a time give the sums of the whole batch: accumulation is exact."""
  batch = _random_batch()
  whole = losses.ppo_clip(*batch, **CLIP)
  parts = [losses.ppo_clip(*[x[i : i + 1] for x in batch], **CLIP) for i in range(3)]
  np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)


def test_nll_and_kl_sums():
  logprobs, old, _, mask = _random_batch()
  total, count = losses.nll(logprobs, mask)
  np.testing.assert_allclose(total, -logprobs[mask].sum(), rtol=1e-6)
  assert count == mask.sum()
  hyper = dict(estimator="kl", clip_min=-0.1, clip_max=0.2)
  want = np.clip((logprobs - old)[mask], -0.1, 0.2).sum()
  np.testing.assert_allclose(losses.kl_loss(logprobs, old, mask, **hyper), want, rtol=1e-5)
  for estimator in ("k9", "full"):
    with pytest.raises(ValueError, match="abs.*control_variate.*kl.*mse.*seq_control_variate"):
      losses.kl_loss(logprobs, old, mask, estimator=estimator, clip_min=0.0, clip_max=1.0)


def test_forward_pass_of_the_reference(fixture_arrays):
  data = fixture_arrays("forward_logps")
  for case in reference.load_json("forward_logps"):
    given = {name: data[f"{case['case']}__{name}"] for name in (
      "logits", "labels", "all_logps", "all_tokens_logps", "sequence_logp", "entropy")}  # fmt: skip
    hidden, labels = given["logits"][:, :-1], given["labels"][:, 1:]
    mask = labels != -100
    vocab = hidden.shape[-1]
    logprobs = functools.partial(
      _token_logprobs,
      hidden,
      np.eye(vocab, dtype=np.float32),
      chunk=4,
      temperature=case["temperature"],
    )
    taken = np.where(mask, logprobs(targets=np.where(mask, labels, 0)), 0)
    np.testing.assert_allclose(taken, given["all_logps"], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(taken.sum(axis=1), given["sequence_logp"], rtol=2e-4, atol=1e-5)
    every = np.stack([logprobs(targets=np.full_like(labels, v)) for v in range(vocab)], axis=-1)
    np.testing.assert_allclose(
      every * mask[..., None], given["all_tokens_logps"], rtol=2e-4, atol=1e-5
    )
    entropy = -(np.exp(every) * every).sum(axis=-1)[mask].mean()
    np.testing.assert_allclose(entropy, given["entropy"], rtol=2e-4)


FORWARD_KL = dict(chunk=3, temperature=0.7, logit_cap=5.0)


def _two_policies(seed=0):
  """Hidden states and unembeddings of a policy and a wider reference; a mask."""
  rng = np.random.default_rng(seed)
  shapes = [(2, 7, 4), (4, 11), (2, 7, 6), (6, 11)]
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes], rng.random((2, 7)) < 0.6


@jax.jit
def _forward_kl(policies, mask, clip_min=-1e9, clip_max=1e9):
  """The loss, and its gradients for all four arrays."""
  loss = lambda arrays: losses.forward_kl(
    *arrays, mask, **FORWARD_KL, clip_min=clip_min, clip_max=clip_max
  )
  return jax.value_and_grad(loss)(policies)


@jax.jit
def _dense_forward_kl(policies, mask, clip_max=1e9):
  def loss(arrays):
    hidden, unembed, ref_hidden, ref_unembed = arrays
    logits = [5 * jnp.tanh(h @ u / 5) for h, u in ((hidden, unembed), (ref_hidden, ref_unembed))]
    new, ref = (jax.nn.log_softmax(x / 0.7) for x in logits)
    divergence = jnp.sum(jnp.exp(ref) * (ref - new), axis=-1)
    return jnp.sum(jnp.where(mask, jnp.minimum(divergence, clip_max), 0))

  return jax.value_and_grad(loss)(policies)


def test_forward_kl_is_that_of_whole_distributions():
  policies, mask = _two_policies()
  whole, _ = _dense_forward_kl(policies, mask)
  some = whole / mask.sum()
  for clip_max in (1e9, some):
    got, got_grads = _forward_kl(policies, mask, clip_max=clip_max)
    want, want_grads = _dense_forward_kl(policies, mask, clip_max)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(got_grads[:2], want_grads[:2], strict=True):
      assert np.any(b != 0)
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(got_grads[2:], want_grads[2:], strict=True):
      assert np.any(b != 0)
      np.testing.assert_array_equal(a, 0)  # the reference is not trained
  assert got < 0.99 * whole
  lowest, grads = _forward_kl(policies, mask, clip_min=100.0)
  assert lowest == 100 * mask.sum() and not np.any(grads[0])


def test_forward_kl_of_a_policy_to_itself_is_zero():
  (hidden, unembed, *_), mask = _two_policies()
  wider = [np.pad(hidden, ((0, 0), (0, 0), (0, 2))), np.pad(unembed, ((0, 2), (0, 0)))]
  value, grads = _forward_kl([hidden, unembed, *wider], mask)
  np.testing.assert_allclose(value, 0, atol=1e-6)
  for gradient in grads:
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
  assert _forward_kl([hidden + 1, unembed, *wider], mask)[0] > 0.01


def test_forward_kl_sees_the_mask_alone():
  (hidden, unembed, ref_hidden, ref_unembed), mask = _two_policies()
  clean = _forward_kl([hidden, unembed, ref_hidden, ref_unembed], mask)
  for junk in (7.0, np.nan, -np.inf):
    h, r = (np.where(mask[..., None], x, np.float32(junk)) for x in (hidden, ref_hidden))
    got = _forward_kl([h, unembed, r, ref_unembed], mask)
    jax.tree.map(np.testing.assert_array_equal, got, clean)


def test_bad_shapes_raise():
  logprobs, old, adv, mask = _random_batch()
  with pytest.raises(AssertionError):
    losses.ppo_clip(logprobs, old, adv, mask[:, 1:], **CLIP)
  with pytest.raises(AssertionError):
    losses.ppo_clip(logprobs, old, adv, mask.astype(np.float32), **CLIP)
  (*policies, ref_unembed), mask = _two_policies()
  with pytest.raises(AssertionError):
    _forward_kl([*policies, ref_unembed[:, 1:]], mask)
  with pytest.raises(AssertionError):
    _forward_kl([*policies, ref_unembed], mask[:, 1:])
