"""PPO (arXiv 1707.06347) with a critic: an advantage a token, by GAE over the critic's values.

The critic is a decoder of its own that starts from the policy's parameters, with a linear head on
its states; `--config.critic.trunk=shared` puts the head on the policy instead. Rollouts are
`grpo.py`'s groups, and so are the variants.

  python -m spo_jax.main --config=configs/ppo.py --workdir=runs/ppo

`spo_jax/config.py` lists every field with its default; any of them is set as --config.field=value.
"""

from configs import grpo
from configs.embedded import EMBEDDED
from configs.experiments import set_schedule
from spo_jax.config import parse_variant


def get_config(variant: str | None = None):
  """The config of a variant: see `grpo.py`."""
  config = grpo.get_config(variant)
  config.advantage.kind = "reward"
  config.advantage.train_zero = True  # rewards of 0 are returns too
  config.loss.scaling = "whiten"
  config.critic.trunk = "own"
  config.critic.gamma = 1.0
  config.critic.lam = 1.0
  config.critic.value_clip = 0.2
  if parse_variant(variant, grpo.VARIANTS, "arithmetic") in EMBEDDED:
    embedded(config)
  else:
    config.critic_optimizer = config.optimizer.copy_and_resolve_references()
    for name in ("warmup_steps", "decay_steps"):
      config.critic_optimizer[name] = config.optimizer.get_ref(name)
  return config


def embedded(config) -> None:
  """PPO on an embedded task: two responses a prompt, as more prompts taught it more."""
  config.rollout.prompts = 256
  config.rollout.samples = 2
  config.minibatches = 4
  set_schedule(config, warmup_share=0.0)  # cosine, to 0
  config.critic_optimizer.learning_rate = 1e-3
