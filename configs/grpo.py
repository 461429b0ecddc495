"""GRPO (arXiv 2402.03300), the baseline: one advantage a response, from the group of its prompt.

A group is a tree of one level, so this is the same code as SPO-tree with other settings: advantages
are divided by the group's deviation, and every response token is trained. The default is the
embedded task; the paper's experiments are in `experiments.py`.

  python -m spo_jax.main --config=configs/grpo.py --workdir=runs/grpo
  python -m spo_jax.main --config=configs/grpo.py:qwen1.5b_math --workdir=runs/qwen_grpo

`spo_jax/config.py` lists every field with its default; any of them is set as --config.field=value.
"""

from configs.embedded import EMBEDDED, Embedded, apply_embedded
from configs.experiments import EXPERIMENTS, OWN, PROMPTS, SAMPLES, Experiment, apply, set_schedule
from spo_jax.config import default_config, parse_variant

VARIANTS = {**EMBEDDED, **EXPERIMENTS, "own": OWN}


def get_config(variant: str | None = None):
  """The config of a variant: an embedded task (default `arithmetic`), a paper's, or `own`."""
  config = default_config()
  name = parse_variant(variant, VARIANTS, "arithmetic")
  config.seed = 0
  config.rollout.strategy = "group"
  config.advantage.kind = "normalized"
  config.loss.use_probability_mask = False
  if name in EMBEDDED:
    embedded(config, EMBEDDED[name])
  else:
    paper(config, VARIANTS[name])
  return config


def embedded(config, task: Embedded) -> None:
  """GRPO on an embedded task."""
  apply_embedded(config, task)
  config.iterations = 240
  config.minibatches = 3  # updates an iteration, as many as SPO has

  config.rollout.prompts = 64
  config.rollout.samples = 8
  config.packing.row_length = 416  # a prompt of 40 tokens and 8 responses of 46 fit a row
  set_schedule(config, warmup_share=0.0)  # cosine, to 0


def paper(config, experiment: Experiment) -> None:
  """GRPO as the paper's baseline."""
  apply(config, experiment)
  config.advantage.train_zero = True  # as in the reference, groups that agree are in the means
  config.minibatches = experiment.chain_updates
  config.epochs = experiment.chain_epochs
  config.rollout.prompts = PROMPTS
  config.rollout.samples = SAMPLES
  config.rollout.slots = PROMPTS
  set_schedule(config)
