"""Dr. GRPO (arXiv 2503.20783): GRPO without its two biases.

Advantages are not divided by the group's deviation, which favours questions that are nearly always
or never solved; and the loss is summed over a response's tokens and divided by a constant, not by
the response's length, which would favour long wrong responses. Variants are those of `grpo.py`.

  python -m spo_jax.main --config=configs/dr_grpo.py --workdir=runs/dr_grpo

`spo_jax/config.py` lists every field with its default; any of them is set as --config.field=value.
"""

from configs import grpo


def get_config(variant: str | None = None):
  """The config of a variant: see `grpo.py`."""
  config = grpo.get_config(variant)
  config.advantage.kind = "difference"
  config.advantage.train_zero = True  # the mean is over all responses
  config.loss.normalization = "constant"
  return config
