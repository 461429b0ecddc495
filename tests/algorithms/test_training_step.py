"""From the reference's collated batch and logits to its loss and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.algorithms import losses, masking
from tests.algorithms import reference
from tests.algorithms.test_losses import HYPER

SHAPE = (4, 15)
VOCAB = 11
CASES = ["chain", "tree", "group", "no_whitening", "grayen", "forward_kl"]


def _logprobs(logits, targets, temperature):
  eye = jnp.eye(VOCAB, dtype=jnp.float32)
  return losses.token_logprobs(logits, eye, targets, chunk=4, temperature=temperature)


@jax.jit
def _training_step(logits, batch, *, use_prob_mask, hyper):
  """Everything that the reference computes for one micro-batch; [B, T] with T = S - 1."""
  mask, targets, temperature = batch["mask"], batch["targets"], hyper["temperature"]
  old, ref = (_logprobs(batch[k], targets, temperature) for k in ("logits_old", "logits_ref"))
  likely = masking.probability_mask(old, mask, threshold=0.9)
  loss_mask = jnp.where(use_prob_mask, likely, mask)
  advantages = jnp.where(
    hyper["whiten_advantages"],
    masking.whiten(
      batch["advantages"], mask, statistics_mask=loss_mask, shift_mean=True, unbiased=True
    ),
    jnp.where(
      hyper["grayen_advantages"],
      masking.rescale(batch["advantages"], mask, unbiased=True),
      batch["advantages"],
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

  (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(logits)
  metrics |= {
    "advantages/mean": masking.masked_mean(advantages, mask),
    "advantages/std": jnp.sqrt(masking.masked_var(advantages, mask, unbiased=True)),
    "num_tokens": jnp.sum(mask),
    "advantages/close_to_zero_perc": masking.masked_mean(
      (jnp.abs(advantages) < 1e-8).astype(jnp.float32), mask
    ),
  }
  return value, grad, metrics, advantages, old, ref


def test_training_steps_of_the_reference(fixture_arrays):
  data = fixture_arrays("training_step")
  cases = [case for case in reference.load_json("training_step") if case["name"] in CASES]
  assert len(cases) == len(CASES)
  for case in cases:
    key, name = case["case"] + "__", case["name"]
    given = {k.removeprefix(key): v for k, v in data.items() if k.startswith(key)}
    close = functools.partial(np.testing.assert_allclose, err_msg=name)
    rows, length = given["advantages_in_loss"].shape
    whole = (slice(0, rows), slice(0, length))
    mask = given["batch_labels"][:, 1:] != -100
    batch = {
      "mask": reference.padded(mask, *SHAPE),
      "targets": reference.padded(np.where(mask, given["batch_labels"][:, 1:], 0), *SHAPE),
      "advantages": reference.padded(given["batch_advantages"][:, 1:], *SHAPE),
      "logits_old": reference.padded(given["logits_old"][:, :-1], *SHAPE, VOCAB),
      "logits_ref": reference.padded(given["logits_ref"][:, :-1], *SHAPE, VOCAB),
    }
    names = [*HYPER, "temperature", "whiten_advantages", "grayen_advantages"]
    loss, grad, metrics, advantages, old, ref = _training_step(
      reference.padded(given["logits_new"][:, :-1], *SHAPE, VOCAB),
      batch,
      use_prob_mask=case["use_prob_mask"],
      hyper={field: case[field] for field in names} | {"num_rows": rows},
    )
    for got, field in ((old, "actor"), (ref, "ref")):
      want = given[f"batch_{field}_shifted_log_probs"]
      close(got[whole][mask], want[mask], rtol=2e-4, atol=1e-5)
      np.testing.assert_array_equal(want[~mask], -1e9)
    close(advantages[whole], given["advantages_in_loss"], rtol=2e-4, atol=1e-5)
    close(loss, given["loss"], rtol=2e-4, atol=1e-5)
    close(grad[whole], given["grad_logits"][:, :-1], rtol=1e-3, atol=2e-6)
    np.testing.assert_array_equal(given["grad_logits"][:, -1], 0)
    compared = metrics.keys() & case["metrics"].keys()
    assert len(compared) >= 8
    for field in compared:
      want = case["metrics"][field]
      close(metrics[field], want, rtol=2e-4, atol=1e-5, err_msg=f"{name} {field}")
