"""Every field of a run, with its unit and its default. Config files start from these and set what
their experiment is about.

`config_check.py` makes them from what the user wrote.
"""

import dataclasses
import math
from typing import Any

import ml_collections

from spo_jax.errors import UserError

# The data sets that are generated, and have a tokenizer.
EMBEDDED = ("arithmetic", "countdown")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where prompts and answers come from."""

  name: str = "arithmetic"  # or "countdown", "gsm8k", "math", "math500", "aime24", "game24", "json"
  variant: str = "plain"
  data_dir: str = ""  # folder that data sets are built in; "" is the workdir's own
  manual_dir: str = ""  # folder of JSON lines that a set is built from; see data/sets.py
  question_field: str = "question"  # of the user's own JSON lines, name "json"
  answer_field: str = "answer"  # likewise
  template: str = "plain"  # key of prompts.TEMPLATES, "chat", or a text with {question}
  system: str = ""  # system turn of the template "chat"
  replacement: bool = False  # draw each batch from the whole split, not by epochs
  tokenizer: str = ""  # folder of a Hugging Face tokenizer; "" is config.model's own
  grader: str = "numbers"  # a name of rewards/registry.py, or MODULE:FUNCTION of your own
  repeated_marker_reward: float = 0.0  # of a response with two or more `####`; 0: as graded
  # The rest is for graders that run in processes of their own, as "math" does.
  grader_workers: int = 0  # processes; 0 is one per CPU core
  grader_timeout_s: float = 5.0  # a response that takes longer has reward 0 and is counted
  grader_memory_mb: int = 2048  # address space of a process


@dataclasses.dataclass(frozen=True)
class NewModelConfig:
  """Geometry of a decoder that starts from random parameters; its vocabulary is the tokenizer's."""

  width: int = 64
  layers: int = 2
  heads: int = 2
  kv_heads: int = 1
  head_dim: int = 32
  ffn: int = 176
  rope_theta: float = 10000.0
  norm_eps: float = 1e-6
  tie_embeddings: bool = True


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """How the decoder computes, whatever its geometry."""

  dtype: str = "float32"  # of activations, matmuls and caches; parameters are float32
  remat: str = "none"  # or "blocks", "dots": what is recomputed in the backward pass; saves memory
  attention: str = "blocks"  # or "flash", "cudnn", "pallas"; see models/attention/__init__.py
  # Update and prefill run the layers as a loop over their stacked weights: they compile in a time
  # that does not grow with the layers, and hold a copy of the weights in dtype.
  scan_layers: bool = False


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adam; see `training/optimizer.py`."""

  learning_rate: float = 4e-4
  warmup_steps: int = 0  # updates
  decay_steps: int = 0  # updates; 0 keeps the rate constant
  decay: str = "cosine"  # or "linear"
  clip_norm: float = 1.0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
  """Supervised training on worked solutions, before RL."""

  max_steps: int = 600
  batch_size: int = 64  # solutions a step
  eval_every: int = 10  # steps between sampled evaluations
  eval_prompts: int = 512  # of the validation split; fewer pass the target by luck
  target_accuracy: float = 0.24  # stop when sampled validation accuracy reaches it


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """The forest that is sampled for each batch of prompts."""

  strategy: str = "tree"  # "tree", "chain" or "group"
  prompts: int = 96  # an iteration
  parts: int = 1  # that the prompts are sampled in; each is graded while the next is sampled
  max_prompt_tokens: int = 40
  # Widths in tokens below max_prompt_tokens: prompts are dealt to the parts by length, and each
  # part is prefilled at the least that holds it. Every width compiles.
  prompt_buckets: tuple[int, ...] = ()
  max_response_tokens: int = 46
  branches: tuple[int, ...] = (2, 2, 2)  # tree: children of a node, by depth
  segment_tokens: tuple[int, ...] = (
    13,
    13,
  )  # tree: M by depth; the last segment takes what is left
  samples: int = 8  # chain, group: trajectories a prompt
  probes: int = 9  # chain: rollouts at a cut
  probe_where: str = "all"  # chain: or "mixed", prompts whose trajectories differ in reward
  cuts_per_group: int = 2  # chain: cuts of a trajectory that are probed together
  temperature: float = 1.0
  top_k: int = 0  # 0 keeps all
  top_p: float = 1.0  # 1 keeps all
  slots: int = 1024  # most groups of continuations that are decoded at a time
  # Waiting groups enter when this share of the slots is idle, so many at a time; 1: all.
  refill_share: float = 0.25
  suffix_chunks: int = 2  # a step reads the chunks of the suffixes that have begun; each compiles
  prefill_chunk: int = 0  # tokens of each prompt that are prefilled at a time; 0: all
  ahead: bool = False  # sample the next forest during an update, by the policy before it
  # Matrices that rollouts are decoded with: "full", in compute.dtype, or "int8": fewer bytes.
  # Prefill and evaluation are of the policy itself.
  weights: str = "full"
  cache: str = "full"  # or "int8": keys and values of rollouts, with a scale a token and head


@dataclasses.dataclass(frozen=True)
class PartitionConfig:
  """Where the segments of a chain begin."""

  kind: str = "adaptive"  # "adaptive", "fixed", "equal", "token", "response" or "delimiter"
  interval: int = 5  # adaptive: cutpoints (tokens below the probability threshold) a segment
  length: int = 10  # fixed: tokens a segment
  parts: int = 4  # equal: segments of a response
  delimiter: str = ";"  # delimiter: a text; a token that has it ends a segment


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """From values to advantages of segments."""

  kind: str = "difference"  # or "normalized", "leave_one_out", "shrinkage", "prover", "reward"
  eps: float = 1e-8  # normalized: added to the siblings' deviation
  best_of: int = 4  # prover: K, of its best-of-K policy
  prover_weight: float = 5.0  # prover: of its advantage beside the policy's own
  tolerance: float = 1e-6  # a segment is trained if its advantage is larger in size
  train_zero: bool = False  # segments without an advantage too: they enter means and the KL
  train_probes: bool = False  # chain: probes too, they are rollouts with known rewards
  pool_trajectory: bool = False  # chain: a cut's value counts the trajectory's own continuation
  unfinished_penalty: float = 0.0  # reward of a response cut off by the length limit
  grade_unfinished: bool = False  # such a response is graded like the others instead


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The policy loss; see `training/objective.py`."""

  kind: str = "ppo_clip"  # or "likelihood" (RestEM), "dpo_positive"
  use_probability_mask: bool = True
  scaling: str = "whiten"  # of advantages over the batch: "whiten", "rescale" or "none"
  normalization: str = (
    "token"  # mean over "token" or "sequence"; "constant": sum / longest response
  )
  segment_weights: str = "equal"  # or "share": of its prompt's rollouts that a segment stands for
  epsilon_low: float = 0.2
  epsilon_high: float = 0.2
  log_ratio_bound: float = 10.0
  ratio_threshold: float = 10.0  # a batch with a larger mean ratio is skipped
  # Largest weight of a token by π_policy / π_sampler, the policy's being computed anew; 0: all
  # weigh 1, and the sampler's log-probs are taken for the policy's.
  importance_cap: float = 0.0
  kl_coef: float = 1e-4  # 0 leaves the reference policy out
  kl_in: str = "loss"  # or "reward", of a critic
  kl_estimator: str = "control_variate"
  kl_clip_max: float = 10.0
  kl_control: str = "fixed"  # or "adaptive": kl_coef follows kl_target
  kl_target: float = 0.01  # adaptive: KL a token
  kl_horizon: int = 10_000  # adaptive: responses in which the coefficient may grow e^0.2-fold
  forward_kl_coef: float = 0.0  # of KL(reference, policy) over the vocabulary
  forward_kl_clip_max: float = 10.0
  dpo_beta: float = 0.1
  dpo_penalty: float = 50.0


@dataclasses.dataclass(frozen=True)
class CriticConfig:
  """PPO's critic; see `training/prepare.py`."""

  trunk: str = (
    "none"  # "none": no critic; "own": a second decoder; "shared": a head on the policy's
  )
  gamma: float = 1.0
  lam: float = 1.0  # λ of GAE
  target: str = "lambda_return"  # A + V; or "return", the discounted sum of rewards
  whiten_rewards: bool = False
  value_clip: float = 0.2  # bound on a value's change in an iteration
  coef: float = 0.5  # shared: weight of the value loss


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
  """The reference's buffer of segments; see `training/replay.py`."""

  max_age: int = (
    0  # iterations in which a segment may be drawn; 0: no buffer, all are trained at once
  )
  segments_per_question: int = 32  # drawn an iteration at most


@dataclasses.dataclass(frozen=True)
class PackingConfig:
  """The packed batch; see `training/packing.py`."""

  row_length: int = 288  # tokens of a packed row
  rows: int = 8  # rows of a micro-batch
  query_block: int = 32  # queries of an attention block; divides row_length
  # Keys of an attention block; divides query_block. The keys listed for queries are as many whole
  # blocks as each segment above them can touch: with short segments, small blocks are few keys.
  key_block: int = 4
  logprob_chunk: int = 288  # tokens a row that are unembedded at a time
  # Places of a row for tokens that the loss reads, with the probability mask; 0: as many as tokens.
  loss_length: int = 0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Accuracy during training."""

  split: str = "test"
  every: int = 30  # iterations; the first and the last policy are evaluated in any case
  prompts: int = 512
  batch: int = 512  # prompts that are prefilled together


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Orbax checkpoints."""

  folder: str = ""  # where they are, gs:// is understood; "" is the workdir
  every: int = 20  # iterations; the last is kept in any case
  every_s: float = 600.0  # also as soon as so many seconds have passed since the last
  keep: int = 2  # newest
  keep_best: int = 1  # besides, those with the best eval/accuracy, of what was evaluated
  grace_s: float = 30.0  # from SIGTERM to SIGKILL: by then the run has saved and ended


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Axes of the device mesh."""

  data: int = -1  # -1 takes all devices that the other axes leave; so it may for one of them
  fsdp: int = 1
  # The tokens of packed rows are split over it, for long contexts; prompts are too.
  sequence: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
  """A run."""

  seed: int = 0
  iterations: int = 200
  minibatches: int = 1  # updates an epoch, each on its share of the packed rows
  epochs: int = 1  # times that an iteration's batch is trained on
  restart: bool = False  # every iteration trains the first policy anew (RestEM)
  # Iterations in a row without a sound update (a gradient that is not finite, a ratio beyond its
  # threshold, a grader that fails on all responses) after which a run stops; none of them is saved.
  unstable_limit: int = 3
  probability_threshold: float = 0.9  # ρ: a token below it is a cutpoint and is trained
  # Folder that keeps compiled programs for later runs; "" keeps none. ~ and gs:// are understood.
  compilation_cache: str = "~/.cache/spo_jax"
  wandb: str = ""  # project of Weights & Biases that metrics go to as well; "" none
  topology: str = ""  # TPUs that `spo_jax.plan` compiles for, unless told otherwise
  model: str = ""  # folder or hub id of a Hugging Face model; "" is a new one, of `new_model`
  data: DataConfig = DataConfig()
  new_model: NewModelConfig = NewModelConfig()
  compute: ComputeConfig = ComputeConfig()
  warm_start: WarmStartConfig = WarmStartConfig()
  warm_start_optimizer: OptimizerConfig = OptimizerConfig(
    learning_rate=4e-3, warmup_steps=20, b2=0.99
  )
  rollout: RolloutConfig = RolloutConfig()
  partition: PartitionConfig = PartitionConfig()
  advantage: AdvantageConfig = AdvantageConfig()
  loss: LossConfig = LossConfig()
  critic: CriticConfig = CriticConfig()
  critic_optimizer: OptimizerConfig = OptimizerConfig()
  replay: ReplayConfig = ReplayConfig()
  packing: PackingConfig = PackingConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()

  @property
  def branches(self) -> tuple[int, ...]:
    """Children of a node by depth; a group is a tree of one level."""
    return (self.rollout.samples,) if self.rollout.strategy == "group" else self.rollout.branches

  @property
  def part_prompts(self) -> int:
    """Prompts that are sampled together."""
    return self.rollout.prompts // self.rollout.parts

  @property
  def responses(self) -> int:
    """Responses that an iteration samples; a chain's probes are not counted."""
    rollout = self.rollout
    each = rollout.samples if rollout.strategy == "chain" else math.prod(self.branches)
    return rollout.prompts * each

  @property
  def budgets(self) -> tuple[int, ...]:
    """Tokens of a segment by depth."""
    fixed = () if self.rollout.strategy == "group" else self.rollout.segment_tokens
    return (*fixed, self.rollout.max_response_tokens - sum(fixed))

  @property
  def longest_segments(self) -> tuple[int, ...]:
    """Tokens of the longest segments on a packed path, the prompt first."""
    rollout = self.rollout
    response = (rollout.max_response_tokens,) if rollout.strategy == "chain" else self.budgets
    if self.advantage.train_probes:  # they lie between the segments, which may be of a token each
      response = (1,) * rollout.max_response_tokens
    return (rollout.max_prompt_tokens, *response)

  @property
  def longest_tree(self) -> int:
    """Tokens of the largest packed tree."""
    rollout = self.rollout
    if rollout.strategy == "chain":
      return rollout.max_prompt_tokens + rollout.samples * rollout.max_response_tokens
    nodes, total = 1, rollout.max_prompt_tokens
    for branch, budget in zip(self.branches, self.budgets, strict=True):
      nodes *= branch
      total += nodes * budget
    return total


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """A model's accuracy on a data set: `python -m spo_jax.evaluate`."""

  model: str = ""  # folder or hub id of a Hugging Face model
  seed: int = 0
  split: str = "test"
  problems: int = 0  # the first so many of the split; 0 is all
  samples: int = 1  # responses a problem
  temperature: float = 0.6  # 0 is greedy
  top_k: int = 0  # 0 keeps all
  top_p: float = 0.95  # 1 keeps all
  max_prompt_tokens: int = 512
  # Budgets of prompt and response together. Responses are sampled once, with the largest; for the
  # others they are cut, which is what sampling with that budget would have given.
  contexts: tuple[int, ...] = (2048, 4096)
  batch: int = 32  # prompts that are prefilled together; kept on disk when they are done
  slots: int = 32  # most prompts whose responses are decoded at a time
  # Waiting prompts enter when this share of the slots is idle, so many at a time; 1: all.
  refill_share: float = 0.25
  suffix_chunks: int = 4  # a step reads the chunks of the responses that have begun; each compiles
  prefill_chunk: int = 0  # tokens of each prompt that are prefilled at a time; 0: all
  compilation_cache: str = "~/.cache/spo_jax"  # as in `Config`
  data: DataConfig = DataConfig()
  compute: ComputeConfig = ComputeConfig()
  mesh: MeshConfig = MeshConfig()


def default_config(config_class: type = Config) -> ml_collections.ConfigDict:
  """The defaults of `Config` or `EvaluationConfig`, for config files to start from."""
  return ml_collections.ConfigDict(dataclasses.asdict(config_class()))


def parse_variant(variant: str | None, known: dict[str, Any], default: str) -> str:
  """The name that stands behind the colon of `--config=FILE:variant`.

  Raises:
    UserError: if it is not known.
  """
  name = variant or default
  if name not in known:
    raise UserError(f"unknown variant {name!r} of this config, one of: {', '.join(known)}")
  return name
