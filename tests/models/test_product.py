import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models.product import product


def random(*shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  ("equation", "inputs", "outputs"),
  [("bti,io->bto", (3,), (5,)), ("bti,ihd->bthd", (6,), (2, 5)), ("bthd,hdo->bto", (2, 3), (4,))],
)
def test_the_product_and_its_gradients_are_those_of_an_einsum(equation, inputs, outputs, dtype):
  x, weight = random(2, 7, *inputs, dtype=dtype), random(*inputs, *outputs, dtype=dtype)
  cotangent = random(1, 1, *outputs, dtype=dtype)

  def found(multiply):
    y, pull = jax.vjp(multiply, x, weight)
    return y, pull(jnp.broadcast_to(cotangent, y.shape))

  got = jax.jit(lambda: found(product))()
  want = jax.jit(lambda: found(lambda x, weight: jnp.einsum(equation, x, weight)))()
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  rounding = 1e-5 if dtype == "float32" else 0.05
  chex.assert_trees_all_close(
    jax.tree.map(jnp.float32, got), jax.tree.map(jnp.float32, want), rtol=rounding, atol=rounding
  )


def test_the_gradient_of_a_weight_transposes_what_is_narrow():
  x, weight = random(1, 8, 3), random(3, 50)
  jaxpr = jax.make_jaxpr(jax.grad(lambda weight: product(x, weight).sum()))(weight)
  shapes = [
    [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
    for eqn in jaxpr.eqns
    if eqn.primitive.name == "dot_general"
  ]
  assert shapes[-1] == [(1, 8, 3), (1, 8, 50), (3, 50)]


def test_a_weight_of_other_inputs_is_refused():
  with pytest.raises(TypeError, match=r"weight of shape \(4, 5\) does not take inputs \(3,\)"):
    product(random(1, 2, 3), random(4, 5))
