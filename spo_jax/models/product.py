"""Products of activations with weights."""

import math

import jax


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
  """What a linear layer does to every token: Σ_i x[b, t, i] weight[i, o].

  Left to JAX, the weight's gradient is the transpose of gradientᵀ x, for which XLA on a CPU first
  writes the transposed gradients: of gate and up, the widest activations there are. As xᵀ gradient
  it needs xᵀ, which query, key and value share, and gate and up. The blocks' forward and backward
  pass takes 0.8 to 0.9 of the time (`benchmarks/RESULTS.md`).

  Args:
    x: [B, T, *I] float.
    weight: [*I, *O] of the same dtype, as many axes I as x has.

  Returns:
    [B, T, *O], of that dtype.

  Raises:
    TypeError: if the axes I differ.
  """
  rows, inputs = x.shape[:2], x.shape[2:]
  outputs = weight.shape[len(inputs) :]
  if weight.shape[: len(inputs)] != inputs:
    raise TypeError(f"a weight of shape {weight.shape} does not take inputs {inputs} of a token")
  flat = _product(
    x.reshape(*rows, math.prod(inputs)), weight.reshape(math.prod(inputs), math.prod(outputs))
  )
  return flat.reshape(*rows, *outputs)


@jax.custom_vjp
def _product(x_BxTxI, weight_IxO):
  return x_BxTxI @ weight_IxO


def _forward(x_BxTxI, weight_IxO):
  return _product(x_BxTxI, weight_IxO), (x_BxTxI, weight_IxO)


def _backward(kept, gradient_BxTxO):
  x_BxTxI, weight_IxO = kept
  sum_of_products = lambda a, b, axes: jax.lax.dot_general(a, b, (axes, ((), ())))
  d_x_BxTxI = sum_of_products(gradient_BxTxO, weight_IxO, ((2,), (1,)))
  d_weight_IxO = sum_of_products(x_BxTxI, gradient_BxTxO, ((0, 1), (0, 1)))
  return d_x_BxTxI, d_weight_IxO


_product.defvjp(_forward, _backward)
