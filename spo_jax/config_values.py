"""Values that the fields of a config can have, each by itself."""

import functools
import math

from spo_jax.config import Config, EvaluationConfig
from spo_jax.errors import UserError
from spo_jax.models.attention import BACKENDS
from spo_jax.models.decoder import REMATS
from spo_jax.models.quantised import KINDS

OPTIMIZERS = ("optimizer", "critic_optimizer", "warm_start_optimizer")
_POSITIVE = (
  "iterations",
  "minibatches",
  "epochs",
  "probability_threshold",
  "unstable_limit",
  *(f"new_model.{name}" for name in ("width", "layers", "heads", "kv_heads", "head_dim", "ffn")),
  "new_model.norm_eps",
  *(f"{name}.{field}" for name in OPTIMIZERS for field in ("learning_rate", "clip_norm")),
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
    for name in OPTIMIZERS
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
_FRACTIONS = tuple(f"{name}.{field}" for name in OPTIMIZERS for field in ("b1", "b2"))
_FINITE = tuple(f"{name}.learning_rate" for name in OPTIMIZERS)
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


def check_training_values(config: Config) -> None:
  """Checks the fields of a run's config one by one.

  Raises:
    UserError: naming the field, its value and what it may be.
  """
  _check_positive(config, _POSITIVE)
  for name in _NOT_NEGATIVE:
    value = field(config, name)
    need(value >= 0, f"config.{name} is {value}, it must be 0 or more")
  for name in _FRACTIONS:
    value = field(config, name)
    need(0 <= value < 1, f"config.{name} is {value}, it must be in [0, 1)")
  for name in _FINITE:
    value = field(config, name)
    need(math.isfinite(value), f"config.{name} is {value}, it must be finite")
  _check_seed(config)
  _check_choices(config, _CHOICES)


def check_evaluation_values(config: EvaluationConfig) -> None:
  """Checks the fields of an evaluation's config one by one.

  Raises:
    UserError: naming the field, its value and what it may be.
  """
  _check_positive(config, _EVALUATION_POSITIVE)
  need(config.problems >= 0, f"config.problems is {config.problems}, it must be 0 (all) or more")
  _check_seed(config)
  _check_choices(config, {n: c for n, c in _CHOICES.items() if n.startswith("compute.")})


def field(config, name: str):
  """The value of a field by its dotted name."""
  return functools.reduce(getattr, name.split("."), config)


def need(condition: bool, message: str) -> None:
  """Raises UserError with the message unless the condition holds."""
  if not condition:
    raise UserError(message)


def _check_positive(config, names: tuple[str, ...]) -> None:
  for name in names:
    value = field(config, name)
    need(value > 0, f"config.{name} is {value}, it must be positive")


def _check_seed(config: Config | EvaluationConfig) -> None:
  need(0 <= config.seed < SEEDS, f"config.seed is {config.seed}, it must be in [0, {SEEDS})")


def _check_choices(config, choices: dict[str, tuple[str, ...]]) -> None:
  for name, known in choices.items():
    value = field(config, name)
    need(value in known, f"config.{name} is {value!r}, it must be one of: {', '.join(known)}")
