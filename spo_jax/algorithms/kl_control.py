"""The weight of the KL to the reference policy from one iteration to the next: host floats."""

import math
from collections.abc import Callable

# Bound on the relative error of the KL that the adaptive controller acts on.
ERROR_BOUND = 0.2


def adapted_kl_coef(
  coef: float, kl: float, *, target: float, horizon: float, samples: float
) -> float:
  """coef · (1 + clip(kl / target - 1, ±0.2) · samples / horizon): a weight that steers to `target`.

  https://arxiv.org/abs/1909.08593, sec. 2.2, where K_β = samples / horizon. A call changes the
  weight by at most 20 % of that share; the estimate may be noisy, and negative.

  Args:
    coef: the weight until now.
    kl: the KL found, in the units of `target`, such as the sum over a response.
    target: the KL wanted, positive.
    horizon: samples in which the weight may grow by 20 %; positive.
    samples: responses drawn since the last call.

  Returns:
    The next weight, positive if coef is.

  Raises:
    ValueError: If target or horizon is not positive, kl is not finite, or samples are negative or
      so many that the weight could reach 0 (5 horizons).
  """
  if target <= 0 or horizon <= 0:
    raise ValueError(f"target and horizon must be positive, got {target} and {horizon}")
  if not 0 <= samples * ERROR_BOUND < horizon:
    longest = horizon / ERROR_BOUND
    raise ValueError(f"samples must be at least 0 and fewer than {longest:g}, got {samples}")
  if not math.isfinite(kl):
    raise ValueError(f"the KL to the reference policy is {kl}")
  error = min(max(kl / target - 1, -ERROR_BOUND), ERROR_BOUND)
  return coef * (1 + error * samples / horizon)


# (coef, kl, *, target, horizon, samples) -> the next coef
KL_CONTROLS: dict[str, Callable[..., float]] = {
  "fixed": lambda coef, kl, **_: coef,
  "adaptive": adapted_kl_coef,
}
