"""From the reference's collated batch and logits to its loss and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.algorithms import kl, masking, returns
from spo_jax.algorithms.logprobs import token_logprobs
from tests.algorithms import reference
from tests.algorithms.test_losses import HYPER

SHAPE = (4, 15)
VOCAB = 11


def _logprobs(logits, targets, temperature):
  eye = jnp.eye(VOCAB, dtype=jnp.float32)
  return token_logprobs(logits, eye, targets, chunk=4, temperature=temperature)


def _critic_advantages(batch, continues, old, ref, hyper):
  """Rewards with a KL of weight reward_kl_coef, GAE, and the reference's metrics of them."""
  mask = batch["mask"]
  args = dict(estimator="kl", clip_min=-jnp.inf, clip_max=jnp.inf)
  reward = functools.partial(
    returns.token_rewards,
    logprobs=old,
    ref_logprobs=ref,
    mask=mask,
    kl_coef=hyper["reward_kl_coef"],
    **args,
  )
  rewards = reward(batch["scores"])
  targets = returns.discounted_returns(rewards, continues, gamma=hyper["gamma"])
  metrics = {
    "rewards/mean": masking.masked_mean(rewards, mask),
    "non_score_rewards": masking.masked_mean(reward(jnp.zeros_like(rewards)), mask),
    "returns": masking.masked_mean(targets, mask),
    "kls": jnp.sum(kl.token_kl(old, ref, mask, **args)) / hyper["num_rows"],
  }
  hyper = {name: hyper[name] for name in ("gamma", "lam")}
  return returns.gae(rewards, batch["values"], continues, **hyper), metrics


@jax.jit
def _training_step(logits, batch, continues, *, use_prob_mask, hyper):
  """Everything that the reference computes for one micro-batch; [B, T] with T = S - 1."""
  mask, targets, temperature = batch["mask"], batch["targets"], hyper["temperature"]
  old, ref = (_logprobs(batch[k], targets, temperature) for k in ("logits_old", "logits_ref"))
  likely = masking.probability_mask(old, mask, threshold=0.9)
  loss_mask = jnp.where(use_prob_mask, likely, mask)
  estimated, metrics = _critic_advantages(batch, continues, old, ref, hyper)
  advantages = jnp.where(hyper["has_values"], estimated, batch["advantages"])
  advantages = jnp.where(
    hyper["whiten_advantages"],
    masking.whiten(advantages, mask, statistics_mask=loss_mask, shift_mean=True, unbiased=True),
    jnp.where(
      hyper["grayen_advantages"], masking.rescale(advantages, mask, unbiased=True), advantages
    ),
  )

  def loss(logits):
    return reference.actor_loss(
      _logprobs(logits, targets, temperature),
      old,
      advantages,
      loss_mask,
      ref,
      logits,
      batch["logits_ref"],
      estimator="control_variate",
      hyper=hyper,
      temperature=temperature,
    )

  (value, loss_metrics), grad = jax.value_and_grad(loss, has_aux=True)(logits)
  if_in_loss = loss_metrics["actor/ref_kl_loss"] / hyper["kl_coef"]
  metrics |= loss_metrics | {
    "kls": jnp.where(hyper["kl_coef"] > 0, if_in_loss, metrics["kls"]),
    "advantages/mean": masking.masked_mean(advantages, mask),
    "advantages/std": jnp.sqrt(masking.masked_var(advantages, mask, unbiased=True)),
    "num_tokens": jnp.sum(mask),
    "_num_participating_tokens": jnp.sum(mask),
    "advantages/close_to_zero_perc": masking.masked_mean(
      (jnp.abs(advantages) < 1e-8).astype(jnp.float32), mask
    ),
  }
  return value, grad, metrics, advantages, old, ref


def _batch(given, mask):
  """A case's arrays, shifted by one, in the shape that all cases share."""
  zeros = np.zeros_like(given["batch_labels"], np.float32)
  pad = lambda x: reference.padded(x, *SHAPE, *[VOCAB] * (x.ndim - 2))
  return {
    "mask": pad(mask),
    "targets": pad(np.where(mask, given["batch_labels"][:, 1:], 0)),
    "advantages": pad(given.get("batch_advantages", zeros)[:, 1:]),
    "values": pad(np.where(mask, given.get("batch_critic_values", zeros)[:, :-1], 0)),
    "scores": pad(reference.terminal_rewards(given["batch_scores"], given["batch_attention_mask"])),
    "logits_old": pad(given["logits_old"][:, :-1]),
    "logits_ref": pad(given["logits_ref"][:, :-1]),
  }


def _hyper(case, rows, has_values):
  in_loss = case["kl_penalty_loss_type"] is not None
  assert case["kl_penalty"] == "kl"
  assert case["kl_penalty_loss_type"] in ("control_variate", None)
  names = [*HYPER, "temperature", "whiten_advantages", "grayen_advantages", "gamma", "lam"]
  # All float, so that cases that write 1 and 1.0 share one compilation.
  return {name: float(case[name]) for name in names} | {
    "kl_coef": case["kl_coef"] * in_loss,
    "reward_kl_coef": case["kl_coef"] * (not in_loss),
    "num_rows": rows,
    "has_values": has_values,
  }


def test_training_steps_of_the_reference(fixture_arrays):
  data = fixture_arrays("training_step")
  for case in reference.load_json("training_step"):
    key, name = case["case"] + "__", case["name"]
    given = {k.removeprefix(key): v for k, v in data.items() if k.startswith(key)}
    has_values = "batch_critic_values" in given
    assert has_values == ("batch_advantages" not in given) == name.startswith("gae_")
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5, err_msg=name)
    rows, length = given["advantages_in_loss"].shape
    whole = (slice(0, rows), slice(0, length))
    mask = given["batch_labels"][:, 1:] != -100
    batch = _batch(given, mask)
    # The reference's recursion has no ends, ours stays in the response.
    for continues, compared in (
      (np.ones(SHAPE, bool), np.ones_like(mask)),
      (reference.inner(batch["mask"]), mask | (not has_values)),
    ):
      loss, grad, metrics, advantages, old, ref = _training_step(
        reference.padded(given["logits_new"][:, :-1], *SHAPE, VOCAB),
        batch,
        continues,
        use_prob_mask=case["use_prob_mask"],
        hyper=_hyper(case, rows, has_values),
      )
      close(advantages[whole][compared], given["advantages_in_loss"][compared])
      close(loss, given["loss"])
      close(grad[whole], given["grad_logits"][:, :-1], rtol=1e-3, atol=2e-6)
      for field in case["metrics"].keys() - {"kl_coef"}:
        close(metrics[field], case["metrics"][field], err_msg=f"{name} {field}")
    np.testing.assert_array_equal(given["grad_logits"][:, -1], 0)
    for got, field in ((old, "actor"), (ref, "ref")):
      want = given[f"batch_{field}_shifted_log_probs"]
      close(got[whole][mask], want[mask])
      np.testing.assert_array_equal(want[~mask], -1e9)
