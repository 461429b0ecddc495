"""SPO-tree (arXiv 2505.23564) on the embedded task: five-step arithmetic with a chain of thought.

A tree of segments a prompt; V(node) = mean of its children's V, bottom-up; A(segment) = V(end) -
V(start); the loss sees the tokens that the sampling policy gave a probability below 0.9.

Needs nothing but a CPU: four to five minutes on two cores, warm start included. With seed 0 sampled
test accuracy goes from 0.24 to 0.63, greedy from 0.42 to 0.77 (`benchmarks/RESULTS.md`).

  python -m spo_jax.main --config=configs/spo_tree.py --workdir=runs/spo_tree
  python -m spo_jax.main --config=configs/spo_tree.py:filler --workdir=runs/spo_tree_filler

`spo_jax/config.py` lists every field with its default; any of them is set as --config.field=value.
"""

from spo_jax.config import default_config, parse_variant

# Segment lengths M of the levels but the last, and the longest response.
VARIANTS = {
  "arithmetic": ("plain", (13, 13), 46),
  "filler": ("filler", (16, 16), 60),
}


def get_config(variant: str | None = None):
  """The config of a variant: `arithmetic` (default) or `filler`."""
  config = default_config()
  data_variant, segment_tokens, max_response_tokens = VARIANTS[
    parse_variant(variant, VARIANTS, "arithmetic")
  ]
  config.seed = 0
  config.iterations = 280
  config.minibatches = 3  # updates an iteration: several small ones learnt faster than a large one

  config.data.name = "arithmetic"
  config.data.variant = data_variant
  config.warm_start.target_accuracy = 0.24  # early on purpose: it leaves RL most of the way
  config.eval.every = 40

  config.rollout.strategy = "tree"
  config.rollout.prompts = 96
  config.rollout.branches = (2, 2, 2)
  config.rollout.segment_tokens = segment_tokens
  config.rollout.max_response_tokens = max_response_tokens
  config.rollout.temperature = 1.0

  config.advantage.kind = "difference"
  config.probability_threshold = 0.9
  config.loss.use_probability_mask = True
  config.loss.scaling = "none"
  config.loss.epsilon_low = config.loss.epsilon_high = 0.2
  config.loss.kl_coef = 1e-4

  config.optimizer.learning_rate = 3e-4
  updates = config.get_ref("iterations") * config.get_ref("minibatches")
  config.optimizer.decay_steps = updates  # cosine, to 0
  config.optimizer.clip_norm = 1.0
  return config
