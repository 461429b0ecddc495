"""The parameters as the steps of decode multiply them: in the dtype of the activations, or int8."""

import jax.numpy as jnp

from spo_jax.models.decoder import SCALES, DecoderConfig, cast_weights
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

  Args:
    cfg: decoder geometry.
    params: its parameters.
    kind: of the weights, of `quantised.KINDS`. "int8": they have scales beside them, one for each
      output channel. The embedding stays in floats, as rows of it are looked up; where it is also
      the unembedding, that becomes a matrix of its own.

  Returns:
    Parameters for `forward` and `token_logits`.
  """
  weights = cast_weights(cfg, params)
  if kind == "full":
    return weights
  unembedding = params["embedding"].T if cfg.tie_embeddings else params["unembedding"]
  weights |= _with_scales({"unembedding": unembedding})
  for layer in range(cfg.layers):
    name = f"block_{layer}"
    weights[name] = weights[name] | _with_scales(params[name])
  return weights


def _with_scales(params):
  """The weights among parameters by name, as ints, and their scales."""
  found = {}
  for name in params.keys() & _SUMMED.keys():
    ints, scales = quantise(params[name], _SUMMED[name])
    found |= {name: ints, name + SCALES: jnp.squeeze(scales, _SUMMED[name])}
  return found
