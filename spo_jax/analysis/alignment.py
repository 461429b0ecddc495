"""How gradients of a method agree with the true one, whose own noise is known and taken out.

C gradients of a method from independent batches, J independent estimates of the true gradient, D
parameters.
"""

from typing import NamedTuple

import numpy as np

from spo_jax.analysis.gradients import Gradients


class Figure(NamedTuple):
  """An estimate and its standard error."""

  value: float
  error: float


class Alignment(NamedTuple):
  """Of one method, at one number of sampled tokens an update."""

  tokens: float  # sampled, an update
  prompts: int
  updates: int  # that the figures are from
  cosine: Figure  # of an update's gradient and the true one; 0 where the gradient is 0
  # Of the mean of infinitely many: 1 if the method is unbiased; NaN if noise hides the mean.
  mean_cosine: Figure
  signal_to_noise: Figure  # |E g|² / E|g - E g|²
  adam_cosine: Figure  # of both after division by the root of the second moment; `adam_scale`


def squared_norm(rows: np.ndarray) -> float:
  """|E x|² from independent rows [J, D] with mean E x, without bias: the mean of xᵢ·xⱼ, i ≠ j."""
  rows = rows.astype(np.float64)
  count = len(rows)
  total = rows.sum(0)
  return float((total @ total - np.sum(rows * rows)) / (count * (count - 1)))


def trust(truth: np.ndarray) -> tuple[float, float]:
  """How far the mean of independent estimates [J, D] of the true gradient can be trusted.

  Returns:
    (cosine of its two halves, cosine that the mean of all is expected to have to the truth).
  """
  halves = truth[0::2].mean(0, dtype=np.float64), truth[1::2].mean(0, dtype=np.float64)
  norms = [np.linalg.norm(half) for half in halves]
  mean = truth.mean(0, dtype=np.float64)
  own = np.sqrt(max(squared_norm(truth), 0.0)) / np.linalg.norm(mean)
  return float(halves[0] @ halves[1] / (norms[0] * norms[1])), float(own)


def align(gradients: Gradients, truth: np.ndarray, multiple: int) -> Alignment:
  """Compares a method's gradients with the true one.

  Cosines are to the true gradient G itself, not to its estimate: the noise of the estimate is
  orthogonal to g on average, so it makes |G| too large, and nothing else; |G|² is estimated from
  products of independent parts.

  Args:
    gradients: of C batches.
    truth: [J, D] float32 independent estimates of the true gradient.
    multiple: batches to an update.
  """
  pooled, single = gradients.pooled(multiple), gradients.pooled(1)
  preconditioner = adam_scale(truth)
  return Alignment(
    tokens=float(gradients.tokens.mean() * multiple),
    prompts=gradients.prompts * multiple,
    updates=len(pooled),
    cosine=_mean(_cosines(pooled, truth)),
    mean_cosine=mean_cosine(single, truth),
    signal_to_noise=signal_to_noise(single, multiple),
    adam_cosine=_mean(_cosines(pooled * preconditioner, truth * preconditioner)),
  )


def adam_scale(truth: np.ndarray) -> np.ndarray:
  """[D] float32, 1 / the root of the second moment of the true gradient's parts [J, D].

  One for all methods, so that they are compared in one metric; 0 where no gradient ever is.
  """
  second_moment = np.mean(np.square(truth), axis=0, dtype=np.float64)
  scale = np.zeros(len(second_moment))
  np.divide(1, np.sqrt(second_moment), out=scale, where=second_moment > 0)
  return scale.astype(np.float32)


def _cosines(rows: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """[C] of gradients; 0 of one that is 0, as if all advantages of its batch are."""
  norms = np.linalg.norm(rows, axis=1) * np.sqrt(max(squared_norm(truth), 0.0))
  return rows @ truth.mean(0, dtype=np.float64) / np.where(norms > 0, norms, 1)


def _mean(values: np.ndarray) -> Figure:
  error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
  return Figure(float(values.mean()), float(error))


def mean_cosine(rows: np.ndarray, truth: np.ndarray) -> Figure:
  """cos(E g, G), free of the noise of both; its error by the jackknife over either's parts.

  Args:
    rows: [C, D] float32, independent gradients.
    truth: [J, D] float32, independent estimates of G.
  """
  rows, truth = rows.astype(np.float64), truth.astype(np.float64)
  inner = rows @ truth.T
  gram, truth_gram = rows @ rows.T, truth @ truth.T
  value = _cosine_of_means(inner, gram, truth_gram)
  over_rows = [
    _cosine_of_means(np.delete(inner, i, 0), _without(gram, i), truth_gram)
    for i in range(len(rows))
  ]
  over_truth = [
    _cosine_of_means(np.delete(inner, j, 1), gram, _without(truth_gram, j))
    for j in range(len(truth))
  ]
  return Figure(value, float(np.hypot(_jackknife(over_rows), _jackknife(over_truth))))


def _without(gram: np.ndarray, i: int) -> np.ndarray:
  return np.delete(np.delete(gram, i, 0), i, 1)


def _pairs_mean(gram: np.ndarray) -> float:
  count = len(gram)
  return (gram.sum() - np.trace(gram)) / (count * (count - 1))


def _cosine_of_means(inner: np.ndarray, gram: np.ndarray, truth_gram: np.ndarray) -> float:
  squared = _pairs_mean(gram) * _pairs_mean(truth_gram)
  return float(inner.mean() / np.sqrt(squared)) if squared > 0 else float("nan")


def _jackknife(values: list[float]) -> float:
  values = np.asarray(values)
  return float(np.sqrt((len(values) - 1) * values.var()))


def signal_to_noise(rows: np.ndarray, multiple: int) -> Figure:
  """|E g|² / E|g - E g|² of means of `multiple` rows [C, D]: `multiple` times that of one row."""
  rows = rows.astype(np.float64)
  gram = rows @ rows.T

  def ratio(gram):
    signal = _pairs_mean(gram)
    return multiple * signal / (np.trace(gram) / len(gram) - signal)

  values = [ratio(_without(gram, i)) for i in range(len(rows))]
  return Figure(float(ratio(gram)), _jackknife(values))
