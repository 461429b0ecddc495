"""Choices of a config that go together, and with the mesh; values are in `config_values.py`."""

import itertools

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
from spo_jax.config_values import (
  OPTIMIZERS,
  check_evaluation_values,
  check_training_values,
  field,
  need,
)
from spo_jax.data.prompts import parse_template

_SPLIT_BATCHES = ("rollout.prompts", "rollout.slots", "eval.batch")
_EVALUATION_BATCHES = ("batch", "slots")


def check_training(config: Config) -> None:
  """Checks the values of a run's config, and that they go together.

  Raises:
    UserError: naming the field, its value and what it may be.
  """
  check_training_values(config)
  need(
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
  need(
    not (advantage.grade_unfinished and advantage.unfinished_penalty),
    f"config.advantage.unfinished_penalty is {advantage.unfinished_penalty}, but with "
    "grade_unfinished no response is given it: set one of the two",
  )


def check_evaluation(config: EvaluationConfig) -> None:
  """Checks the values of an evaluation's config.

  Raises:
    UserError: naming the field, its value and what it may be.
  """
  need(config.model != "", "config.model names no model: give a folder or a hub id")
  check_evaluation_values(config)
  need(
    config.samples <= MOST_SAMPLES,
    f"config.samples is {config.samples}, a majority vote takes at most {MOST_SAMPLES}",
  )
  _check_data(config.data)
  _check_top(config)
  _check_prefill(config)
  need(
    config.temperature >= 0,
    f"config.temperature is {config.temperature}, it must be 0 (greedy) or more",
  )
  need(
    config.temperature > 0 or config.samples == 1,
    f"config.samples is {config.samples}: greedy responses (config.temperature 0) are all the same",
  )
  shortest = min(config.contexts, default=0)
  need(
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
    size = field(config, name)
    need(
      size % row_shards == 0,
      f"config.{name} {size} cannot be divided over the mesh, whose data x fsdp x sequence axes "
      f"are {row_shards}: use a multiple of {row_shards}",
    )
  if isinstance(config, Config):
    row, rows = config.packing, config.packing.rows
    need(
      rows % packed_row_shards == 0,
      f"config.packing.rows {rows} cannot be divided over the mesh, whose data x fsdp axes are "
      f"{packed_row_shards}: use a multiple of {packed_row_shards}",
    )
    parts = row_shards // packed_row_shards
    need(
      parts == 1 or (row.row_length % (parts * row.query_block) == 0),
      f"config.packing.row_length {row.row_length} cannot be divided over the mesh, whose sequence "
      f"axis is {parts}: use a multiple of {parts} x query_block {row.query_block}",
    )
    need(
      parts == 1 or config.compute.attention != "pallas",
      "config.compute.attention 'pallas' has no sequence axis: use 'flash', or "
      "config.mesh.sequence 1",
    )
    size = config.part_prompts
    need(
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
  need(
    not config.rollout.ahead or devices == 1,
    f"config.rollout.ahead samples beside the update, which is safe on one device, and the mesh "
    f"has {devices}: set it to False",
  )


def _check_data(data: DataConfig) -> None:
  need(
    data.name == "json" or (data.question_field, data.answer_field) == ("question", "answer"),
    f"config.data.question_field and answer_field are of the data set 'json', not '{data.name}'",
  )
  parse_template(data.template, data.system)
  workers = data.grader_workers
  need(workers >= 0, f"config.data.grader_workers is {workers}, it must be 0 (one a core) or more")


def _check_new_model(config: Config) -> None:
  new = config.new_model
  need(
    not config.model or new == NewModelConfig(),
    f"config.new_model is of a model that starts from random parameters, and config.model is "
    f"{config.model!r}: set one of the two",
  )
  need(
    new.heads % new.kv_heads == 0,
    f"config.new_model: heads {new.heads} must be a multiple of kv_heads {new.kv_heads}",
  )
  need(
    new.width % new.heads == 0,
    f"config.new_model: width {new.width} must be a multiple of heads {new.heads}, or "
    "`transformers` would not load what --export writes",
  )
  need(new.head_dim % 2 == 0, f"config.new_model.head_dim {new.head_dim} must be even (RoPE)")


def _check_optimizers(config: Config) -> None:
  for name in OPTIMIZERS:
    steps = field(config, name)
    need(
      steps.decay_steps == 0 or steps.decay_steps > steps.warmup_steps,
      f"config.{name}.decay_steps {steps.decay_steps} must be 0 or more than warmup_steps "
      f"{steps.warmup_steps}",
    )


def _check_rollout(config: Config) -> None:
  rollout = config.rollout
  need(rollout.temperature > 0, "config.rollout.temperature must be above 0: rollouts explore")
  _check_top(rollout, "rollout.")
  _check_prefill(rollout, "rollout.")
  need(
    rollout.prompts % rollout.parts == 0,
    f"config.rollout.parts {rollout.parts} must divide config.rollout.prompts {rollout.prompts}: "
    "each part has as many",
  )
  edges = (0, *rollout.prompt_buckets, rollout.max_prompt_tokens)
  need(
    all(a < b for a, b in itertools.pairwise(edges)),
    f"config.rollout.prompt_buckets {rollout.prompt_buckets} must increase, from 1 or more to less "
    f"than max_prompt_tokens {rollout.max_prompt_tokens}",
  )
  fits = len(config.branches) == len(config.budgets)
  need(
    rollout.strategy == "chain" or (fits and min((*config.branches, *config.budgets)) > 0),
    f"config.rollout: branches {config.branches} need segment_tokens for all levels but the last, "
    f"which takes what max_response_tokens {rollout.max_response_tokens} leaves; "
    f"budgets are {config.budgets}",
  )


def _check_top(sampling: RolloutConfig | EvaluationConfig, where: str = "") -> None:
  top_p, top_k = sampling.top_p, sampling.top_k
  need(0 < top_p <= 1, f"config.{where}top_p is {top_p}, it must be in (0, 1]")
  need(top_k >= 0, f"config.{where}top_k is {top_k}, it must be 0 (all) or more")


def _check_prefill(sampling: RolloutConfig | EvaluationConfig, where: str = "") -> None:
  chunk = sampling.prefill_chunk
  need(
    chunk >= 0,
    f"config.{where}prefill_chunk is {chunk}, it must be 0 (whole prompts at once) or more tokens",
  )


def _check_packing(config: Config) -> None:
  packing = config.packing
  for name, divisor in (("row_length", "query_block"), ("query_block", "key_block")):
    a, b = field(packing, name), field(packing, divisor)
    need(a % b == 0, f"config.packing.{name} {a} must be a multiple of {divisor} {b}")
  need(
    0 <= packing.loss_length <= packing.row_length,
    f"config.packing.loss_length is {packing.loss_length}, it must be 0 (as row_length) to "
    f"row_length {packing.row_length}",
  )
  path = sum(config.longest_segments)
  need(
    packing.row_length >= path,
    f"config.packing.row_length {packing.row_length} must hold the longest prompt and response, "
    f"{path} tokens",
  )


def _check_method(config: Config) -> None:
  """Whether rollout, advantage, loss and critic go together."""
  rollout, advantage, loss, critic = config.rollout, config.advantage, config.loss, config.critic
  has_critic = critic.trunk != "none"
  group, chain = rollout.strategy == "group", rollout.strategy == "chain"
  need(
    not has_critic or (group and advantage.kind == "reward" and advantage.train_zero),
    "config.critic estimates advantages from rewards of whole responses: it needs "
    "config.rollout.strategy 'group', config.advantage.kind 'reward' and train_zero",
  )
  need(
    not (config.restart and critic.trunk == "shared"),
    "config.restart begins every iteration with the first policy, which has no value head: it "
    "does not go with config.critic.trunk 'shared'",
  )
  for name in ("gamma", "lam"):
    value = field(critic, name)
    need(0 <= value <= 1, f"config.critic.{name} is {value}, it must be in [0, 1]")
  need(
    loss.kl_in == "loss" or has_critic,
    "config.loss.kl_in 'reward' needs a critic: set config.critic.trunk",
  )
  need(
    loss.kl_control == "fixed" or loss.kl_coef > 0,
    "config.loss.kl_control 'adaptive' needs a config.loss.kl_coef above 0 to begin with",
  )
  need(
    loss.kl_control == "fixed" or ERROR_BOUND * config.responses < loss.kl_horizon,
    f"config.loss.kl_horizon {loss.kl_horizon} must be more than {ERROR_BOUND:g} times the "
    f"{config.responses} responses of an iteration, or one iteration could bring kl_coef to 0",
  )
  need(
    rollout.probe_where == "all" or (chain and rollout.samples > 1),
    "config.rollout.probe_where 'mixed' asks whether a prompt's trajectories agree: it needs "
    "config.rollout.strategy 'chain' and more than one of config.rollout.samples",
  )
  need(
    chain or not (advantage.train_probes or advantage.pool_trajectory),
    "config.advantage.train_probes and pool_trajectory are of config.rollout.strategy 'chain'",
  )
  need(
    loss.kind != "dpo_positive" or (group and config.packing.row_length >= config.longest_tree),
    "config.loss.kind 'dpo_positive' compares responses of a group in one row: it needs "
    "config.rollout.strategy 'group' and config.packing.row_length of at least "
    f"{config.longest_tree}",
  )
  need(
    loss.normalization != "constant" or not (chain or loss.segment_weights == "share"),
    "config.loss.normalization 'constant' divides by the number of trained segments, each taken "
    "for a response: it does not go with config.rollout.strategy 'chain' or segment_weights "
    "'share'",
  )
  need(
    loss.importance_cap == 0 or loss.importance_cap >= 1,
    f"config.loss.importance_cap is {loss.importance_cap}, it must be 0 (off) or at least 1, the "
    "weight of a token that policy and sampler find equally likely",
  )
  exact = (rollout.weights, rollout.cache) == ("full", "full")
  need(
    exact or loss.importance_cap > 0 or loss.kind != "ppo_clip",
    f"config.rollout.weights {rollout.weights!r} and cache {rollout.cache!r} draw from another "
    "distribution than the policy's: set config.loss.importance_cap, 2.0 say, which corrects it",
  )
  need(
    loss.importance_cap == 0 or (loss.kind == "ppo_clip" and not config.restart),
    "config.loss.importance_cap corrects the old log-probs of config.loss.kind 'ppo_clip': it does "
    "not go with other kinds, nor with config.restart, which trains another policy than it sampled",
  )
  whole = has_critic or loss.kind == "dpo_positive" or loss.segment_weights == "share"
  need(
    not (config.replay.max_age and (whole or loss.normalization == "sequence")),
    "config.replay keeps segments without their siblings: it does not go with config.critic, "
    "config.loss.kind 'dpo_positive', segment_weights 'share' or normalization 'sequence'",
  )
  need(
    config.replay.max_age >= 0,
    f"config.replay.max_age is {config.replay.max_age}, it must be 0 (no buffer) or more",
  )
