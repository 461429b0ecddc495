"""RestEM (arXiv 2312.06585), an offline baseline: responses that are right become training data.

An iteration samples responses to many questions (E-step), and fine-tunes the first policy on those
with a reward, by their likelihood (M-step). Variants are those of `grpo.py`.

  python -m spo_jax.main --config=configs/restem.py --workdir=runs/restem

`spo_jax/config.py` lists every field with its default; any of them is set as --config.field=value.
"""

from configs import grpo
from configs.embedded import EMBEDDED
from spo_jax.config import parse_variant

ROUNDS = 4  # of E-step and M-step


def get_config(variant: str | None = None):
  """The config of a variant: see `grpo.py`."""
  config = grpo.get_config(variant)
  config.advantage.kind = "reward"
  config.advantage.train_zero = False  # responses without a reward are no examples
  config.loss.kind = "likelihood"
  config.loss.scaling = "none"
  config.loss.kl_coef = 0.0
  config.restart = True
  config.iterations = ROUNDS
  config.minibatches = 32
  config.epochs = 3
  config.eval.every = 1
  # Each M-step has a schedule of its own: the optimiser starts anew with the policy.
  config.optimizer.warmup_steps = 0
  config.optimizer.decay_steps = config.get_ref("minibatches") * config.get_ref("epochs")
  config.rollout.prompts = 1024
  if parse_variant(variant, grpo.VARIANTS, "arithmetic") in EMBEDDED:
    config.optimizer.learning_rate = 1e-3
  return config
