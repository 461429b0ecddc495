"""The embedded tasks: generated data and a tokenizer of their own, for a model of 0.1 M parameters.

Every method's config takes them from here, and adds what is the method's own.
"""

import dataclasses

from spo_jax.config import WarmStartConfig


@dataclasses.dataclass(frozen=True)
class Embedded:
  """What a task fixes for every method; lengths in tokens."""

  data: str
  variant: str
  grader: str
  max_prompt_tokens: int
  max_response_tokens: int
  tree_segments: tuple[int, ...]  # M of SPO-tree's levels but the last
  chain_interval: int = 2  # cutpoints a segment of SPO-chain; plain responses have 5 to 10
  # Of the policy: what sweeps found best for most methods (benchmarks/RESULTS.md), for filler an
  # older one: there 6e-4, and 4e-4 since.
  learning_rate: float = 4e-4
  # It stops early on purpose: that leaves RL most of the way.
  warm_start: WarmStartConfig = WarmStartConfig(target_accuracy=0.24)


ARITHMETIC = Embedded("arithmetic", "plain", "numbers", 40, 46, tree_segments=(26,))
EMBEDDED = {
  "arithmetic": ARITHMETIC,
  "filler": dataclasses.replace(
    ARITHMETIC,
    variant="filler",
    max_response_tokens=60,
    tree_segments=(32,),
    chain_interval=5,
    learning_rate=6e-4,
  ),
  "long": dataclasses.replace(
    ARITHMETIC,
    variant="long",
    max_prompt_tokens=60,
    max_response_tokens=90,
    tree_segments=(45,),
    warm_start=WarmStartConfig(max_steps=2000, eval_every=25, target_accuracy=0.24),
  ),
  # A first operation has 5 to 8 tokens, which the first segment holds; a try about 14.
  "countdown": Embedded(
    "countdown",
    "plain",
    "countdown",
    max_prompt_tokens=12,
    max_response_tokens=38,
    tree_segments=(8,),
    learning_rate=8e-4,
    warm_start=WarmStartConfig(max_steps=1500, eval_every=50, target_accuracy=0.24),
  ),
}


def apply_embedded(config, task: Embedded) -> None:
  """Sets what an embedded task fixes for every method."""
  config.data.name = task.data
  config.data.variant = task.variant
  config.data.grader = task.grader
  config.warm_start.update(dataclasses.asdict(task.warm_start))
  config.rollout.max_prompt_tokens = task.max_prompt_tokens
  config.rollout.max_response_tokens = task.max_response_tokens
  config.rollout.temperature = 1.0

  config.loss.scaling = "none"
  config.loss.epsilon_low = config.loss.epsilon_high = 0.2
  config.loss.kl_coef = 1e-4
  config.optimizer.clip_norm = 1.0
  config.optimizer.learning_rate = task.learning_rate
