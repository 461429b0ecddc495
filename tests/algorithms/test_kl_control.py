import pytest

from spo_jax.algorithms import kl_control

HYPER = dict(target=6.0, horizon=1000.0, samples=100)


@pytest.mark.parametrize(
  "kl, factor",
  [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (7.2, 1.02), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)],
)
def test_the_weight_follows_the_error_up_to_a_fifth(kl, factor):
  for coef in (0.1, 1e-4):
    assert kl_control.adapted_kl_coef(coef, kl, **HYPER) == pytest.approx(coef * factor)


def test_the_fixed_weight_stays():
  assert kl_control.KL_CONTROLS["fixed"](0.1, 60.0, **HYPER) == 0.1
  assert kl_control.KL_CONTROLS["adaptive"](0.1, 60.0, **HYPER) == pytest.approx(0.102)


def test_the_weight_steers_the_kl_to_its_target():
  """A policy whose KL is inverse to the weight settles at target, from either side."""
  for coef in (1e-3, 10.0):
    for _ in range(1500):
      coef = kl_control.adapted_kl_coef(coef, 0.3 / coef, **HYPER)
    assert 0.3 / coef == pytest.approx(HYPER["target"], rel=1e-2)


@pytest.mark.parametrize(
  "kl, change, message",
  [
    (6.0, dict(target=0.0), "target and horizon must be positive, got 0.0"),
    (6.0, dict(horizon=-1.0), "target and horizon must be positive"),
    (6.0, dict(samples=5000), "samples must be at least 0 and fewer than 5000, got 5000"),
    (6.0, dict(samples=-1), "samples must be at least 0"),
    (float("nan"), {}, "the KL to the reference policy is nan"),
    (float("inf"), {}, "the KL to the reference policy is inf"),
  ],
)
def test_what_would_break_the_weight_raises(kl, change, message):
  with pytest.raises(ValueError, match=message):
    kl_control.adapted_kl_coef(0.1, kl, **(HYPER | change))


def test_the_weight_stays_positive():
  coef = kl_control.adapted_kl_coef(0.1, 0.0, **(HYPER | dict(samples=4999)))
  assert 0 < coef < 1e-3
