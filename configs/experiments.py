"""The paper's experiments: what they share whatever the method. The method files make them whole.

Hyperparameters are those of AIFrameResearch/SPO (its configs/*.jsonnet); where ours differ, a
comment says so. Each names a machine; whether a method fits it is told, without it, by

  python -m spo_jax.plan --config=configs/spo_tree.py:qwen1.5b_math --topology=v5e:4x4

What each needs: `topology` names the chips, 16 of TPU v5e, of whose 15.75 GiB the models of 1 to
1.5 billion parameters take 8.5 to 10, 13 at 4K; DeepSeekMath-7B wants 16 of v5p. Hours are known of
one machine only, with random weights, whose responses never end: an H100 sampled the trees of 4 of
qwen1.5b_math's 32 prompts in 43 s and trained on them in 91 s, in rows of 2048 tokens, so 18
minutes an iteration at most. benchmarks/RESULTS.md has what was compiled and measured.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A model, its data, and the lengths that fit both."""

  model: str  # hub id; --config.model=DIR names a folder instead
  data: str
  template: str
  grader: str
  max_prompt_tokens: int  # longer prompts are left out
  max_response_tokens: int
  top_p: float  # of rollouts
  tree_segment: int  # M of SPO-tree: tokens of a segment of the first levels
  tree_prompts: int  # an iteration
  tree_updates: int  # an iteration
  probes: int  # of SPO-chain
  chain_updates: int  # an epoch, of SPO-chain and GRPO
  chain_epochs: int  # an iteration, likewise
  chain_interval: int  # cutpoints a segment
  tree_row_length: int = 2048  # tokens of a packed row of SPO-tree
  slots: int = 128  # of SPO: nodes or trajectories whose continuations are decoded at a time
  topology: str = "v5e:4x4"  # TPUs, as spo_jax.plan takes them
  row_shards: int = 0  # chips that rows are split over, the others split heads; 0: all chips


_change = dataclasses.replace

# Paper, short chains of thought: SPO-chain with interval 5 ends 6 to 12 points of GSM8K test
# accuracy above PPO and GRPO.
RHO_GSM8K = Experiment(
  model="realtreetune/rho-1b-sft-GSM8K",
  data="gsm8k",
  template="math_task",
  grader="gsm8k",
  max_prompt_tokens=384,  # 1512 there; no question of GSM8K is so long
  max_response_tokens=1024,
  top_p=0.9,
  tree_segment=30,
  tree_prompts=16,
  tree_updates=8,
  probes=9,
  chain_updates=8,
  chain_epochs=2,
  chain_interval=5,
)
RHO_MATH = _change(
  RHO_GSM8K,
  model="realtreetune/rho-1b-sft-MATH",
  data="math",
  grader="math",
  max_prompt_tokens=512,  # 1512 there, with 2047 tokens for prompt and response
  tree_segment=100,
)
# Paper, long chains of thought, MATH500 at 2K: 0.566 before, GRPO 0.62, SPO-tree 0.736; at 4K
# 0.740, 0.752, 0.828.
R1_MATH = Experiment(
  model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
  data="math",
  template="r1_math",
  grader="math",
  max_prompt_tokens=200,
  max_response_tokens=1848,  # 2048 with the prompt
  top_p=1.0,
  tree_segment=600,
  tree_prompts=32,
  tree_updates=4,
  probes=4,
  chain_updates=4,
  chain_epochs=1,
  chain_interval=40,
  tree_row_length=16384,  # 1.1 copies of a token; rows of 2048, a leaf and its ancestors, held 2.6
)
# Parameters, moments and the reference policy of 7 billion parameters take 110 GB, the caches of
# SPO-chain's 512 trajectories of 1536 tokens 390 GB, and while they are made 260 GB more.
DEEPSEEK_GSM8K = _change(
  RHO_GSM8K,
  model="realtreetune/deepseekmath-7b-sft-GSM8K",
  chain_updates=4,
  slots=64,  # the suffixes of 128 trajectories' probes would take 1.2 TB
  topology="v5p:2x2x4",
)
EXPERIMENTS = {
  "rho1b_gsm8k": RHO_GSM8K,
  "rho1b_math": RHO_MATH,
  "qwen1.5b_math": R1_MATH,
  # Goes on from qwen1.5b_math: give its --export as --config.model.
  "qwen1.5b_math_4k": _change(
    R1_MATH,
    max_response_tokens=3896,  # 4096 with the prompt
    tree_segment=1111,
    slots=64,  # the plan says that SPO-chain's probes do not fit with 128
  ),
  "qwen1.5b_game24": _change(R1_MATH, data="game24", template="r1_game24", grader="game24"),
  "qwen2.5_1.5b_math": _change(
    R1_MATH,
    model="Qwen/Qwen2.5-1.5B",
    template="math_task",
    max_prompt_tokens=512,
    max_response_tokens=512,  # 1024 with the prompt
    tree_segment=100,
    tree_row_length=4096,
    tree_prompts=16,
    probes=9,
    chain_interval=5,
  ),
  "qwen2.5_0.5b_gsm8k": _change(
    R1_MATH,
    model="Qwen/Qwen2.5-0.5B-Instruct",
    data="gsm8k",
    template="r1_gsm8k",
    grader="gsm8k",
    max_prompt_tokens=320,  # 200 there, of the question alone
    max_response_tokens=704,  # 1024 with the prompt
    tree_segment=100,
    tree_row_length=4096,
    chain_interval=5,
  ),
  "deepseekmath7b_gsm8k": DEEPSEEK_GSM8K,
  "deepseekmath7b_math": _change(
    DEEPSEEK_GSM8K,
    model="realtreetune/deepseekmath-7b-sft-MATH-v2",
    data="math",
    grader="math",
    max_prompt_tokens=512,
    tree_segment=66,
  ),
}
# Beyond the paper: 7 billion parameters and 32K tokens, on 256 chips of v5e or 64 of v5p, for trees
# of 4 x 4. Each of 64 parts of the mesh has a prompt, a row, and one node whose children are
# decoded. `extend` gathers the caches of a layer on each chip: from segments of 15872 tokens it
# takes 16.3 GiB of v5e's 15.75, and more from 6 branches or from prompts for 256 parts.
R1_MATH_32K = _change(
  R1_MATH,
  model="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
  max_prompt_tokens=1024,
  max_response_tokens=31744,  # 32768 with the prompt
  tree_segment=12288,  # the last ones have 19456
  tree_prompts=64,
  tree_row_length=32768,
  slots=64,
  topology="v5e:16x16",
  row_shards=64,
)
# A model and JSON lines of your own: --config.model=DIR --config.data.manual_dir=DIR.
OWN = _change(
  R1_MATH,
  model="",
  data="json",
  template="plain",
  max_prompt_tokens=512,
  max_response_tokens=1024,
  tree_segment=100,
  tree_row_length=2048,
  chain_interval=5,
)

SAMPLES = 8  # trajectories a prompt, of SPO-chain and GRPO
PROMPTS = 64  # an iteration, of SPO-chain and GRPO
WARMUP_SHARE = 0.03  # of all updates


def apply(config, experiment: Experiment) -> None:
  """Sets what an experiment fixes for every method."""
  config.iterations = 1000
  config.topology = experiment.topology
  config.model = experiment.model
  config.warm_start.max_steps = 0  # the models have been taught already
  config.data.name = experiment.data
  config.data.template = experiment.template
  config.data.grader = experiment.grader
  config.data.replacement = True
  config.rollout.max_prompt_tokens = experiment.max_prompt_tokens
  config.rollout.max_response_tokens = experiment.max_response_tokens
  config.rollout.temperature = 0.6
  config.rollout.top_p = experiment.top_p

  config.loss.scaling = "whiten"
  config.loss.kl_coef = 1e-4
  config.loss.kl_estimator = "control_variate"
  config.loss.epsilon_low = config.loss.epsilon_high = 0.2

  config.optimizer.learning_rate = 1e-6
  config.optimizer.b2 = 0.999
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip_norm = 1.0
  config.optimizer.decay = "linear"

  config.compute.dtype = "bfloat16"
  config.compute.remat = "blocks"
  config.compute.attention = "flash"  # memory linear in the length of a row
  config.mesh.data = 1
  config.mesh.fsdp = -1  # all devices: parameters, moments and rows are split over them
  config.packing.query_block = 256
  config.packing.key_block = 128
  config.packing.logprob_chunk = 512
  path = experiment.max_prompt_tokens + experiment.max_response_tokens
  config.packing.row_length = max(2048, -(-path // 1024) * 1024)
  config.packing.rows = 16  # of a micro-batch: one a chip on 16 chips
  if experiment.row_shards:
    config.mesh.fsdp = config.packing.rows = experiment.row_shards
    config.mesh.tensor = -1
    config.compute.attention = "pallas"
    config.compute.scan_layers = True
    config.rollout.prefill_chunk = 512
  config.eval.split = "validation"
  config.eval.prompts = 256
  config.eval.batch = 64
  config.eval.every = 20
  config.checkpoint.every = 10


def set_schedule(config, warmup_share: float = WARMUP_SHARE) -> None:
  """Warm-up and decay over all updates, also where the command line changes their number."""
  counts = [config.get_ref(name) for name in ("iterations", "minibatches", "epochs")]
  updates = counts[0] * counts[1] * counts[2]
  config.optimizer.warmup_steps = (updates * warmup_share).to_int()
  config.optimizer.decay_steps = updates
