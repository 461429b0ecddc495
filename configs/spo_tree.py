"""SPO-tree (arXiv 2505.23564): a tree of segments a prompt; V(node) = mean of its children's V,
bottom-up; A(segment) = V(end) - V(start); the loss sees the tokens that the sampling policy gave a
probability below 0.9.

The default is the embedded task, five-step arithmetic with a chain of thought: many small trees,
and a baseline from all of them together in place of V(start). It needs nothing but a CPU: two to
five minutes on two cores, warm start included (`benchmarks/RESULTS.md`). The paper's experiments,
and what they need, are in `experiments.py`.

  python -m spo_jax.main --config=configs/spo_tree.py --workdir=runs/spo_tree
  python -m spo_jax.main --config=configs/spo_tree.py:filler --workdir=runs/spo_tree_filler
  python -m spo_jax.main --config=configs/spo_tree.py:long --workdir=runs/spo_tree_long
  python -m spo_jax.main --config=configs/spo_tree.py:countdown --workdir=runs/spo_tree_countdown
  python -m spo_jax.main --config=configs/spo_tree.py:qwen1.5b_math --workdir=runs/qwen

`spo_jax/config.py` lists every field with its default; any of them is set as --config.field=value.
"""

from configs.embedded import EMBEDDED, Embedded, apply_embedded
from configs.experiments import EXPERIMENTS, OWN, R1_MATH_32K, Experiment, apply, set_schedule
from spo_jax.config import default_config, parse_variant

USUAL_BRANCHES = (6, 6, 6)
# The paper's other trees, and a long one.
BRANCHES = {
  "rho1b_gsm8k_456": (4, 5, 6),
  "rho1b_gsm8k_888": (8, 8, 8),
  "qwen7b_math_32k": (4, 4),
}
OTHER_TREES = {
  "rho1b_gsm8k_456": EXPERIMENTS["rho1b_gsm8k"],
  "rho1b_gsm8k_888": EXPERIMENTS["rho1b_gsm8k"],
  "qwen7b_math_32k": R1_MATH_32K,
}
VARIANTS = {**EMBEDDED, **EXPERIMENTS, **OTHER_TREES, "own": OWN}


def get_config(variant: str | None = None):
  """The config of a variant: an embedded task (default `arithmetic`), a paper's, or `own`."""
  config = default_config()
  name = parse_variant(variant, VARIANTS, "arithmetic")
  config.seed = 0
  config.rollout.strategy = "tree"
  config.advantage.kind = "difference"
  config.probability_threshold = 0.9
  config.loss.use_probability_mask = True
  if name in EMBEDDED:
    embedded(config, EMBEDDED[name])
  else:
    paper(config, VARIANTS[name], BRANCHES.get(name, USUAL_BRANCHES))
  return config


def embedded(config, task: Embedded) -> None:
  """SPO-tree on an embedded task."""
  apply_embedded(config, task)
  config.iterations = 280
  config.minibatches = 3  # updates an iteration: several small ones learnt faster than a large one
  config.eval.every = 40

  config.rollout.prompts = 160
  config.rollout.branches = (2,) * (len(task.tree_segments) + 1)
  config.rollout.segment_tokens = task.tree_segments
  # Beyond the paper, and much better (benchmarks/RESULTS.md): many small trees, and for baseline
  # what the whole batch of them tells, where siblings alone are few.
  config.advantage.kind = "shrinkage"

  config.packing.loss_length = 96  # of 288; an iteration's rows have 10 to 80 such tokens
  set_schedule(config, warmup_share=0.0)  # cosine, to 0


def paper(config, experiment: Experiment, branches: tuple[int, ...]) -> None:
  """SPO-tree as in the paper.

  The reference trains at most 512 or 1024 segments an iteration, drawn from a replay buffer of the
  last 8; here all segments whose advantage is not zero are trained at once, as packing makes them
  cheap, in as many updates.
  """
  apply(config, experiment)
  config.minibatches = experiment.tree_updates
  config.rollout.prompts = experiment.tree_prompts
  config.rollout.branches = branches
  config.rollout.segment_tokens = (experiment.tree_segment,) * (len(branches) - 1)
  config.rollout.slots = experiment.slots
  config.packing.row_length = max(config.packing.row_length, experiment.tree_row_length)
  set_schedule(config)
