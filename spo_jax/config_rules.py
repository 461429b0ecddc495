"""Values of a config that can work, and choices that go together."""

import functools
import itertools
import math

from spo_jax.algorithms.kl_control import ERROR_BOUND
from spo_jax.algorithms.voting import MOST_SAMPLES
from spo_jax.config import (
  EMBEDDED,
  Config,
  DataConfig,
  EvaluationConfig,
  NewModelConfig,
  RolloutConfig,
)
from spo_jax.data.prompts import parse_template
from spo_jax.errors import UserError
from spo_jax.models.attention import BACKENDS
from spo_jax.models.decoder import REMATS
from spo_jax.models.quantised import KINDS

_OPTIMIZERS = ("optimizer", "critic_optimizer", "warm_start_optimizer")
_POSITIVE = (
  "iterations",
  "minibatches",
  "epochs",
  "probability_threshold",
  "unstable_limit",
  *(f"new_model.{name}" for name in ("width", "layers", "heads", "kv_heads", "head_dim", "ffn")),
  "new_model.norm_eps",
  *(f"{name}.{field}" for name in _OPTIMIZERS for field in ("learning_rate", "clip_norm")),
  "rollout.prompts",
  "rollout.parts",
  "rollout.samples",
  "rollout.probes",
  "rollout.cuts_per_group",
  "rollout.max_prompt_tokens",
  "rollout.slots",
  "rollout.suffix_chunks",
  "partition.interval",
  "partition.length",
  "partition.parts",
  "advantage.best_of",
  "loss.log_ratio_bound",
  "loss.ratio_threshold",
  "loss.kl_target",
  "loss.kl_horizon",
  "loss.dpo_beta",
  "critic.value_clip",
  "replay.segments_per_question",
  "packing.rows",
  "packing.query_block",
  "packing.key_block",
  "packing.logprob_chunk",
  "eval.every",
  "eval.prompts",
  "eval.batch",
  "checkpoint.every",
  "checkpoint.keep",
  "data.grader_timeout_s",
  "data.grader_memory_mb",
  "warm_start.batch_size",
  "warm_start.eval_every",
  "warm_start.eval_prompts",
)
_NOT_NEGATIVE = (
  *(
    f"{name}.{field}"
    for name in _OPTIMIZERS
    for field in ("warmup_steps", "decay_steps", "weight_decay", "eps")
  ),
  "warm_start.max_steps",
  "advantage.eps",
  "advantage.tolerance",
  "loss.epsilon_low",
  "loss.epsilon_high",
  "loss.kl_coef",
  "loss.kl_clip_max",
  "loss.forward_kl_coef",
  "loss.forward_kl_clip_max",
  "loss.dpo_penalty",
  "critic.coef",
  "checkpoint.keep_best",
  "checkpoint.grace_s",
)
SEEDS = 2**32  # numbers that the libraries which shuffle and draw take as a seed
_CHOICES = {
  "rollout.strategy": ("tree", "chain", "group"),
  "rollout.probe_where": ("all", "mixed"),
  "rollout.weights": KINDS,
  "rollout.cache": KINDS,
  "partition.kind": ("adaptive", "fixed", "equal", "token", "response", "delimiter"),
  "advantage.kind": (
    "difference",
    "normalized",
    "leave_one_out",
    "shrinkage",
    "prover",
    "reward",
  ),
  "loss.kind": ("ppo_clip", "likelihood", "dpo_positive"),
  "loss.scaling": ("whiten", "rescale", "none"),
  "loss.normalization": ("token", "sequence", "constant"),
  "loss.segment_weights": ("equal", "share"),
  "loss.kl_in": ("loss", "reward"),
  "loss.kl_control": ("fixed", "adaptive"),
  "critic.trunk": ("none", "own", "shared"),
  "critic.target": ("return", "lambda_return"),
  # "seq_control_variate" sums over a row, and a packed row holds many responses.
  "loss.kl_estimator": ("kl", "abs", "mse", "control_variate"),
  "optimizer.decay": ("cosine", "linear"),
  "critic_optimizer.decay": ("cosine", "linear"),
  "warm_start_optimizer.decay": ("cosine", "linear"),
  "compute.dtype": ("float32", "bfloat16"),
  "compute.attention": BACKENDS,
  "compute.remat": tuple(REMATS),
}
_EVALUATION_POSITIVE = (
  "samples",
  "max_prompt_tokens",
  "batch",
  "slots",
  "suffix_chunks",
  "data.grader_timeout_s",
  "data.grader_memory_mb",
)
_SPLIT_BATCHES = ("rollout.prompts", "rollout.slots", "eval.batch")
_EVALUATION_BATCHES = ("batch", "slots")


def check_training(config: Config) -> None:
  """Checks the values of a run's config, and that they go together.

  Raises:
    UserError: naming the field, its value and what it may be.
  """
  _check_positive(config, _POSITIVE)
  for name in _NOT_NEGATIVE:
    value = _field(config, name)
    _need(value >= 0, f"config.{name} is {value}, it must be 0 or more")
  _check_seed(config)
  _check_choices(config, _CHOICES)
  _need(
    config.data.name in EMBEDDED or config.model != "" or config.data.tokenizer != "",
    f"data set '{config.data.name}' needs config.model, a folder or hub id of a Hugging Face "
    "model, or config.data.tokenizer",
  )
  _check_data(config.data)
  _check_new_model(config)
  _check_optimizers(config)
  _check_rollout(config)
  _check_packing(config)
  _check_method(config)
  advantage = config.advantage
  _need(
    not (advantage.grade_unfinished and advantage.unfinished_penalty),
    f"config.advantage.unfinished_penalty is {advantage.unfinished_penalty}, but with "
    "grade_unfinished no response is given it: set one of the two",
  )


def check_evaluation(config: EvaluationConfig) -> None:
  """Checks the values of an evaluation's config.

  Raises:
    UserError: naming the field, its value and what it may be.
  """
  _need(config.model != "", "config.model names no model: give a folder or a hub id")
  _check_positive(config, _EVALUATION_POSITIVE)
  _check_seed(config)
  _need(config.problems >= 0, f"config.problems is {config.problems}, it must be 0 (all) or more")
  _need(
    config.samples <= MOST_SAMPLES,
    f"config.samples is {config.samples}, a majority vote takes at most {MOST_SAMPLES}",
  )
  _check_choices(config, {n: c for n, c in _CHOICES.items() if n.startswith("compute.")})
  _check_data(config.data)
  _check_top(config)
  _check_prefill(config)
  _need(
    config.temperature >= 0,
    f"config.temperature is {config.temperature}, it must be 0 (greedy) or more",
  )
  _need(
    config.temperature > 0 or config.samples == 1,
    f"config.samples is {config.samples}: greedy responses (config.temperature 0) are all the same",
  )
  shortest = min(config.contexts, default=0)
  _need(
    shortest > config.max_prompt_tokens,
    f"config.contexts {config.contexts}: each must hold a prompt of config.max_prompt_tokens "
    f"{config.max_prompt_tokens} and a response",
  )


def check_mesh(
  config: Config | EvaluationConfig, row_shards: int, packed_row_shards: int | None = None
) -> None:
  """Checks that every batch can be split over the mesh.

  Args:
    config: of a run or an evaluation.
    row_shards: parts that prompts are split into.
    packed_row_shards: parts that packed rows are split into, of a run; None: as many.

  Raises:
    UserError: naming the batch that cannot, and both numbers.
  """
  packed_row_shards = packed_row_shards or row_shards
  names = _SPLIT_BATCHES if isinstance(config, Config) else _EVALUATION_BATCHES
  for name in names:
    size = _field(config, name)
    _need(
      size % row_shards == 0,
      f"config.{name} {size} cannot be divided over the mesh, whose data x fsdp x sequence axes "
      f"are {row_shards}: use a multiple of {row_shards}",
    )
  if isinstance(config, Config):
    row, rows = config.packing, config.packing.rows
    _need(
      rows % packed_row_shards == 0,
      f"config.packing.rows {rows} cannot be divided over the mesh, whose data x fsdp axes are "
      f"{packed_row_shards}: use a multiple of {packed_row_shards}",
    )
    parts = row_shards // packed_row_shards
    _need(
      parts == 1 or (row.row_length % (parts * row.query_block) == 0),
      f"config.packing.row_length {row.row_length} cannot be divided over the mesh, whose sequence "
      f"axis is {parts}: use a multiple of {parts} x query_block {row.query_block}",
    )
    _need(
      parts == 1 or config.compute.attention != "pallas",
      "config.compute.attention 'pallas' has no sequence axis: use 'flash', or "
      "config.mesh.sequence 1",
    )
    size = config.part_prompts
    _need(
      size % row_shards == 0,
      f"config.rollout.parts {config.rollout.parts}: the {size} prompts of each cannot be divided "
      f"over the mesh, whose data x fsdp x sequence axes are {row_shards}: use fewer parts",
    )


def check_ahead(config: Config, devices: int) -> None:
  """Checks that sampling beside the update cannot block it.

  Raises:
    UserError: if the mesh has several devices: each would begin the programs of two threads in an
      order of its own, and what exchanges data in one of them would wait for the other.
  """
  _need(
    not config.rollout.ahead or devices == 1,
    f"config.rollout.ahead samples beside the update, which is safe on one device, and the mesh "
    f"has {devices}: set it to False",
  )


def _check_positive(config, names: tuple[str, ...]) -> None:
  for name in names:
    value = _field(config, name)
    _need(value > 0, f"config.{name} is {value}, it must be positive")


def _check_seed(config: Config | EvaluationConfig) -> None:
  _need(0 <= config.seed < SEEDS, f"config.seed is {config.seed}, it must be in [0, {SEEDS})")


def _check_choices(config, choices: dict[str, tuple[str, ...]]) -> None:
  for name, known in choices.items():
    value = _field(config, name)
    _need(value in known, f"config.{name} is {value!r}, it must be one of: {', '.join(known)}")


def _field(config, name: str):
  return functools.reduce(getattr, name.split("."), config)


def _need(condition: bool, message: str) -> None:
  if not condition:
    raise UserError(message)


def _check_data(data: DataConfig) -> None:
  _need(
    data.name == "json" or (data.question_field, data.answer_field) == ("question", "answer"),
    f"config.data.question_field and answer_field are of the data set 'json', not '{data.name}'",
  )
  parse_template(data.template, data.system)
  workers = data.grader_workers
  _need(workers >= 0, f"config.data.grader_workers is {workers}, it must be 0 (one a core) or more")


def _check_new_model(config: Config) -> None:
  new = config.new_model
  _need(
    not config.model or new == NewModelConfig(),
    f"config.new_model is of a model that starts from random parameters, and config.model is "
    f"{config.model!r}: set one of the two",
  )
  _need(
    new.heads % new.kv_heads == 0,
    f"config.new_model: heads {new.heads} must be a multiple of kv_heads {new.kv_heads}",
  )
  _need(new.head_dim % 2 == 0, f"config.new_model.head_dim {new.head_dim} must be even (RoPE)")


def _check_optimizers(config: Config) -> None:
  for name in _OPTIMIZERS:
    steps = _field(config, name)
    _need(
      steps.decay_steps == 0 or steps.decay_steps > steps.warmup_steps,
      f"config.{name}.decay_steps {steps.decay_steps} must be 0 or more than warmup_steps "
      f"{steps.warmup_steps}",
    )
    rate = steps.learning_rate
    _need(math.isfinite(rate), f"config.{name}.learning_rate is {rate}, it must be finite")
    for field in ("b1", "b2"):
      value = _field(steps, field)
      _need(0 <= value < 1, f"config.{name}.{field} is {value}, it must be in [0, 1)")


def _check_rollout(config: Config) -> None:
  rollout = config.rollout
  _need(rollout.temperature > 0, "config.rollout.temperature must be above 0: rollouts explore")
  _check_top(rollout, "rollout.")
  _check_prefill(rollout, "rollout.")
  _need(
    rollout.prompts % rollout.parts == 0,
    f"config.rollout.parts {rollout.parts} must divide config.rollout.prompts {rollout.prompts}: "
    "each part has as many",
  )
  edges = (0, *rollout.prompt_buckets, rollout.max_prompt_tokens)
  _need(
    all(a < b for a, b in itertools.pairwise(edges)),
    f"config.rollout.prompt_buckets {rollout.prompt_buckets} must increase, from 1 or more to less "
    f"than max_prompt_tokens {rollout.max_prompt_tokens}",
  )
  fits = len(config.branches) == len(config.budgets)
  _need(
    rollout.strategy == "chain" or (fits and min((*config.branches, *config.budgets)) > 0),
    f"config.rollout: branches {config.branches} need segment_tokens for all levels but the last, "
    f"which takes what max_response_tokens {rollout.max_response_tokens} leaves; "
    f"budgets are {config.budgets}",
  )


def _check_top(sampling: RolloutConfig | EvaluationConfig, where: str = "") -> None:
  top_p, top_k = sampling.top_p, sampling.top_k
  _need(0 < top_p <= 1, f"config.{where}top_p is {top_p}, it must be in (0, 1]")
  _need(top_k >= 0, f"config.{where}top_k is {top_k}, it must be 0 (all) or more")


def _check_prefill(sampling: RolloutConfig | EvaluationConfig, where: str = "") -> None:
  chunk = sampling.prefill_chunk
  _need(
    chunk >= 0,
    f"config.{where}prefill_chunk is {chunk}, it must be 0 (whole prompts at once) or more tokens",
  )


def _check_packing(config: Config) -> None:
  packing = config.packing
  for name, divisor in (("row_length", "query_block"), ("query_block", "key_block")):
    a, b = _field(packing, name), _field(packing, divisor)
    _need(a % b == 0, f"config.packing.{name} {a} must be a multiple of {divisor} {b}")
  _need(
    0 <= packing.loss_length <= packing.row_length,
    f"config.packing.loss_length is {packing.loss_length}, it must be 0 (as row_length) to "
    f"row_length {packing.row_length}",
  )
  path = sum(config.longest_segments)
  _need(
    packing.row_length >= path,
    f"config.packing.row_length {packing.row_length} must hold the longest prompt and response, "
    f"{path} tokens",
  )


def _check_method(config: Config) -> None:
  """Whether rollout, advantage, loss and critic go together."""
  rollout, advantage, loss, critic = config.rollout, config.advantage, config.loss, config.critic
  has_critic = critic.trunk != "none"
  group, chain = rollout.strategy == "group", rollout.strategy == "chain"
  _need(
    not has_critic or (group and advantage.kind == "reward" and advantage.train_zero),
    "config.critic estimates advantages from rewards of whole responses: it needs "
    "config.rollout.strategy 'group', config.advantage.kind 'reward' and train_zero",
  )
  _need(
    not (config.restart and critic.trunk == "shared"),
    "config.restart begins every iteration with the first policy, which has no value head: it "
    "does not go with config.critic.trunk 'shared'",
  )
  for name in ("gamma", "lam"):
    value = _field(critic, name)
    _need(0 <= value <= 1, f"config.critic.{name} is {value}, it must be in [0, 1]")
  _need(
    loss.kl_in == "loss" or has_critic,
    "config.loss.kl_in 'reward' needs a critic: set config.critic.trunk",
  )
  _need(
    loss.kl_control == "fixed" or loss.kl_coef > 0,
    "config.loss.kl_control 'adaptive' needs a config.loss.kl_coef above 0 to begin with",
  )
  _need(
    loss.kl_control == "fixed" or ERROR_BOUND * config.responses < loss.kl_horizon,
    f"config.loss.kl_horizon {loss.kl_horizon} must be more than {ERROR_BOUND:g} times the "
    f"{config.responses} responses of an iteration, or one iteration could bring kl_coef to 0",
  )
  _need(
    rollout.probe_where == "all" or (chain and rollout.samples > 1),
    "config.rollout.probe_where 'mixed' asks whether a prompt's trajectories agree: it needs "
    "config.rollout.strategy 'chain' and more than one of config.rollout.samples",
  )
  _need(
    chain or not (advantage.train_probes or advantage.pool_trajectory),
    "config.advantage.train_probes and pool_trajectory are of config.rollout.strategy 'chain'",
  )
  _need(
    loss.kind != "dpo_positive" or (group and config.packing.row_length >= config.longest_tree),
    "config.loss.kind 'dpo_positive' compares responses of a group in one row: it needs "
    "config.rollout.strategy 'group' and config.packing.row_length of at least "
    f"{config.longest_tree}",
  )
  _need(
    loss.normalization != "constant" or not (chain or loss.segment_weights == "share"),
    "config.loss.normalization 'constant' divides by the number of trained segments, each taken "
    "for a response: it does not go with config.rollout.strategy 'chain' or segment_weights "
    "'share'",
  )
  _need(
    loss.importance_cap == 0 or loss.importance_cap >= 1,
    f"config.loss.importance_cap is {loss.importance_cap}, it must be 0 (off) or at least 1, the "
    "weight of a token that policy and sampler find equally likely",
  )
  exact = (rollout.weights, rollout.cache) == ("full", "full")
  _need(
    exact or loss.importance_cap > 0 or loss.kind != "ppo_clip",
    f"config.rollout.weights {rollout.weights!r} and cache {rollout.cache!r} draw from another "
    "distribution than the policy's: set config.loss.importance_cap, 2.0 say, which corrects it",
  )
  _need(
    loss.importance_cap == 0 or (loss.kind == "ppo_clip" and not config.restart),
    "config.loss.importance_cap corrects the old log-probs of config.loss.kind 'ppo_clip': it does "
    "not go with other kinds, nor with config.restart, which trains another policy than it sampled",
  )
  whole = has_critic or loss.kind == "dpo_positive" or loss.segment_weights == "share"
  _need(
    not (config.replay.max_age and (whole or loss.normalization == "sequence")),
    "config.replay keeps segments without their siblings: it does not go with config.critic, "
    "config.loss.kind 'dpo_positive', segment_weights 'share' or normalization 'sequence'",
  )
  _need(
    config.replay.max_age >= 0,
    f"config.replay.max_age is {config.replay.max_age}, it must be 0 (no buffer) or more",
  )
