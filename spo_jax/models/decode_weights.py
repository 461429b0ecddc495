"""The parameters as the steps of decode multiply them: in the dtype of the activations, or int8."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.infra.mesh import spread_shardings
from spo_jax.models.decoder import SCALES, DecoderConfig, block_name, cast_weights, init_params
from spo_jax.models.quantised import quantise

# Axes of a weight that its product sums over: they share a scale.
_SUMMED = {
  "query": (0,),
  "key": (0,),
  "value": (0,),
  "out": (0, 1),
  "gate": (0,),
  "up": (0,),
  "down": (0,),
  "unembedding": (0,),
}


def decode_weights(cfg: DecoderConfig, params, kind: str):
  """Parameters for a loop that multiplies them again and again.

  They are cast once, and where `fsdp` splits them moved once, so that a step sends rows and no
  summands; see `infra.mesh.spread_shardings`.

  Args:
    cfg: of `DecoderConfig.for_decode`.
    params: its parameters.
    kind: of the weights, of `quantised.KINDS`. "int8": they have scales beside them, one for each
      output channel. The embedding stays in floats, as rows of it are looked up; where it is also
      the unembedding, that becomes a matrix of its own.

  Returns:
    Parameters for `forward` and `token_logits`.
  """
  weights = cast_weights(cfg, params)
  if kind == "int8":
    unembedding = params["embedding"].T if cfg.tie_embeddings else params["unembedding"]
    weights |= _with_scales({"unembedding": unembedding})
    for layer in range(cfg.layers):
      name = block_name(layer)
      weights[name] = weights[name] | _with_scales(params[name])
  return weights if cfg.spread is None else _place(weights, _spread(cfg))


def _spread(cfg: DecoderConfig):
  """Shardings of the weights, by their names."""
  boxed = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
  shardings = spread_shardings(cfg.spread, boxed)
  transposed = PartitionSpec(*shardings["embedding"].spec[::-1])
  return {"unembedding": NamedSharding(cfg.spread, transposed)} | shardings


def _place(tree, shardings):
  """Pins arrays of nested dicts; those without a sharding, as scales, are the compiler's."""
  if not isinstance(tree, dict):
    return jax.lax.with_sharding_constraint(tree, shardings)
  pin = lambda name, x: _place(x, shardings[name]) if name in shardings else x
  return {name: pin(name, x) for name, x in tree.items()}


def _with_scales(params):
  """The weights among parameters by name, as ints, and their scales."""
  found = {}
  for name in params.keys() & _SUMMED.keys():
    ints, scales = quantise(params[name], _SUMMED[name])
    found |= {name: ints, name + SCALES: jnp.squeeze(scales, _SUMMED[name])}
  return found
