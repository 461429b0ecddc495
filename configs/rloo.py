"""RLOO (arXiv 2402.14740): GRPO's group, with the mean of a response's siblings as its baseline.

A(response) = reward - mean reward of the others; nothing is divided by the group's deviation.
Variants are those of `grpo.py`.

  python -m spo_jax.main --config=configs/rloo.py --workdir=runs/rloo

`spo_jax/config.py` lists every field with its default; any of them is set as --config.field=value.
"""

from configs import grpo


def get_config(variant: str | None = None):
  """The config of a variant: see `grpo.py`."""
  config = grpo.get_config(variant)
  config.advantage.kind = "leave_one_out"
  return config
