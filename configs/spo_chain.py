"""SPO-chain (arXiv 2505.23564) on the embedded task: five-step arithmetic with a chain of thought.

Trajectories are cut before every k-th token that the policy gave a probability below 0.9; V(cut) =
mean reward of probe rollouts from there; A(segment) = V(end) - V(start); the loss sees those
unlikely tokens alone.

Needs nothing but a CPU. `benchmarks/RESULTS.md` tells what it reaches.

  python -m spo_jax.main --config=configs/spo_chain.py --workdir=runs/spo_chain

`spo_jax/config.py` lists every field with its default; any of them is set as --config.field=value.
"""

from spo_jax.config import default_config, parse_variant

# Variant of the data, and the longest response.
VARIANTS = {"arithmetic": ("plain", 46), "filler": ("filler", 60)}


def get_config(variant: str | None = None):
  """The config of a variant: `arithmetic` (default) or `filler`."""
  config = default_config()
  data_variant, max_response_tokens = VARIANTS[parse_variant(variant, VARIANTS, "arithmetic")]
  config.seed = 0
  config.iterations = 240

  config.data.name = "arithmetic"
  config.data.variant = data_variant
  config.warm_start.target_accuracy = 0.24  # early on purpose: it leaves RL most of the way

  config.rollout.strategy = "chain"
  config.rollout.prompts = 48
  config.rollout.samples = 2
  config.rollout.probes = 4
  config.rollout.cuts_per_group = 2
  config.rollout.max_response_tokens = max_response_tokens
  config.rollout.temperature = 1.0
  config.rollout.slots = 96

  config.partition.kind = "adaptive"
  config.partition.interval = 2  # cutpoints a segment; responses here have 5 to 10
  config.advantage.kind = "difference"
  config.probability_threshold = 0.9
  config.loss.use_probability_mask = True
  config.loss.scaling = "none"
  config.loss.epsilon_low = config.loss.epsilon_high = 0.2
  config.loss.kl_coef = 1e-4

  config.optimizer.learning_rate = 4e-4  # the best of a sweep: benchmarks/RESULTS.md
  updates = config.get_ref("iterations") * config.get_ref("minibatches")
  config.optimizer.decay_steps = updates  # cosine, to 0
  config.optimizer.clip_norm = 1.0
  return config
