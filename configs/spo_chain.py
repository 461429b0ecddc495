"""SPO-chain (arXiv 2505.23564): trajectories are cut before every k-th token that the policy gave a
probability below 0.9; V(cut) = mean reward of probe rollouts from there; A(segment) = V(end) -
V(start); the loss sees those unlikely tokens alone.

The default is the embedded task, five-step arithmetic with a chain of thought, where probes are
trained too and the baseline is of the whole batch. It needs nothing but a CPU.
`benchmarks/RESULTS.md` tells what it reaches. The paper's experiments, and what they need, are in
`experiments.py`.

  python -m spo_jax.main --config=configs/spo_chain.py --workdir=runs/spo_chain
  python -m spo_jax.main --config=configs/spo_chain.py:rho1b_gsm8k --workdir=runs/rho

`spo_jax/config.py` lists every field with its default; any of them is set as --config.field=value.
"""

from configs.embedded import EMBEDDED, Embedded, apply_embedded
from configs.experiments import EXPERIMENTS, OWN, PROMPTS, SAMPLES, Experiment, apply, set_schedule
from spo_jax.config import default_config, parse_variant

# The paper's other intervals: cutpoints a segment.
INTERVALS = {f"rho1b_gsm8k_int{k}": k for k in (2, 10, 100)}
OTHER_INTERVALS = {name: EXPERIMENTS["rho1b_gsm8k"] for name in INTERVALS}
VARIANTS = {**EMBEDDED, **EXPERIMENTS, **OTHER_INTERVALS, "own": OWN}


def get_config(variant: str | None = None):
  """The config of a variant: an embedded task (default `arithmetic`), a paper's, or `own`."""
  config = default_config()
  name = parse_variant(variant, VARIANTS, "arithmetic")
  config.seed = 0
  config.rollout.strategy = "chain"
  config.partition.kind = "adaptive"
  config.advantage.kind = "difference"
  config.probability_threshold = 0.9
  config.loss.use_probability_mask = True
  if name in EMBEDDED:
    embedded(config, EMBEDDED[name])
  else:
    experiment = VARIANTS[name]
    paper(config, experiment, INTERVALS.get(name, experiment.chain_interval))
  return config


def embedded(config, task: Embedded) -> None:
  """SPO-chain on an embedded task."""
  apply_embedded(config, task)
  config.iterations = 240
  config.minibatches = 3

  config.rollout.prompts = 128
  config.rollout.samples = 2
  config.rollout.probes = 1
  config.rollout.probe_where = "mixed"  # where both trajectories agree there is less to learn
  config.rollout.cuts_per_group = 2
  config.rollout.slots = 256

  config.partition.interval = task.chain_interval
  # Beyond the paper, and better at equal tokens (benchmarks/RESULTS.md): probes are rollouts of
  # the policy like any others, so they are trained, and a cut's value counts the trajectory's own
  # continuation; a segment weighs as much as it stands for; the baseline is of the whole batch.
  config.advantage.kind = "shrinkage"
  config.advantage.train_probes = True
  config.advantage.pool_trajectory = True
  config.loss.segment_weights = "share"

  config.packing.loss_length = 96  # as in spo_tree.py
  set_schedule(config, warmup_share=0.0)  # cosine, to 0


def paper(config, experiment: Experiment, interval: int) -> None:
  """SPO-chain as in the paper.

  The reference probes at most the first 25 cuts of a trajectory; here all of them are probed.
  """
  apply(config, experiment)
  config.advantage.train_zero = True  # whitening moves them, and they are in the means
  config.minibatches = experiment.chain_updates
  config.epochs = experiment.chain_epochs
  config.rollout.prompts = PROMPTS
  config.rollout.samples = SAMPLES
  config.rollout.probes = experiment.probes
  config.rollout.cuts_per_group = 2
  config.rollout.slots = experiment.slots
  config.partition.interval = interval
  set_schedule(config)
