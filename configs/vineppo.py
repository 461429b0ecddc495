"""VinePPO (arXiv 2410.01679): SPO-chain whose segments are reasoning steps, cut at a delimiter.

V(step's start) = mean reward of probe rollouts from there; every token of a step is trained with
the step's advantage, without a probability mask. Variants are those of `spo_chain.py`.

  python -m spo_jax.main --config=configs/vineppo.py --workdir=runs/vineppo

`spo_jax/config.py` lists every field with its default; any of them is set as --config.field=value.
"""

from configs import spo_chain
from configs.embedded import EMBEDDED
from spo_jax.config import parse_variant


def get_config(variant: str | None = None):
  """The config of a variant: see `spo_chain.py`."""
  config = spo_chain.get_config(variant)
  config.partition.kind = "delimiter"
  config.advantage.kind = "difference"
  config.advantage.train_probes = config.advantage.pool_trajectory = False
  config.loss.segment_weights = "equal"
  config.loss.use_probability_mask = False
  embedded = parse_variant(variant, spo_chain.VARIANTS, "arithmetic") in EMBEDDED
  config.partition.delimiter = ";" if embedded else "\n"
  if embedded:
    config.rollout.prompts = 48
    config.rollout.probes = 4
    config.rollout.probe_where = "all"
    config.rollout.slots = 96
    config.optimizer.learning_rate = 2.5e-4  # the best of a sweep: benchmarks/RESULTS.md
  return config
