"""Typed configs: every mistake is one clear line before anything is built."""

import dataclasses
import math

import ml_collections
import pytest

from configs import dpo_positive, dr_grpo, grpo, ppo, restem, rloo, spo_chain, spo_tree, vineppo
from configs.experiments import EXPERIMENTS
from spo_jax.config import Config, default_config, parse_variant
from spo_jax.config_check import check_field, from_config_dict
from spo_jax.config_rules import check_ahead, check_mesh
from spo_jax.errors import UserError
from spo_jax.infra.mesh import mesh_shape

METHODS = (spo_tree, spo_chain, grpo, rloo, dr_grpo, ppo, vineppo, restem, dpo_positive)
# A method's variants are its own, or those of the method that it starts from.
VARIANTS = {module: spo_chain if module is vineppo else grpo for module in METHODS}
VARIANTS |= {module: module for module in (spo_tree, spo_chain, grpo)}


def changed(path: str, value) -> ml_collections.ConfigDict:
  return all_changed({path: value})


def all_changed(fields) -> ml_collections.ConfigDict:
  config = default_config()
  config.unlock()
  with config.ignore_type():
    for path, value in fields.items():
      node, names = config, path.split(".")
      for name in names[:-1]:
        node = node[name]
      node[names[-1]] = value
  return config


def test_defaults_round_trip():
  assert from_config_dict(default_config(), Config) == Config()


@pytest.mark.parametrize("module", METHODS)
def test_every_variant_of_every_config_is_valid(module):
  known = VARIANTS[module]
  for variant in ["", *known.VARIANTS]:
    config = module.get_config(variant)
    if variant == "own":
      with pytest.raises(UserError, match="data set 'json' needs config.model"):
        from_config_dict(config, Config)
      config.model = "somewhere"
    config = from_config_dict(config, Config)
    if variant in EXPERIMENTS:
      assert config.model == EXPERIMENTS[variant].model and config.data.name != "arithmetic"
    elif variant == "own":
      assert config.data.name == "json"
    elif variant in known.EMBEDDED:
      task = known.EMBEDDED[variant]
      data = (config.data.name, config.data.variant, config.data.grader)
      assert data == (task.data, task.variant, task.grader)
      assert config.rollout.max_response_tokens == task.max_response_tokens
  with pytest.raises(UserError, match="unknown variant 'nope'.*arithmetic"):
    module.get_config("nope")


@pytest.mark.parametrize("module", METHODS)
def test_every_experiment_divides_over_the_machine_that_it_names(module):
  for variant, experiment in EXPERIMENTS.items():
    chips = math.prod(int(size) for size in experiment.topology.partition(":")[2].split("x"))
    check_mesh(from_config_dict(module.get_config(variant), Config), chips)


@pytest.mark.parametrize(("chips", "tensor"), [(256, 4), (64, 1)])
def test_rows_of_32k_tokens_divide_over_both_pods(chips, tensor):
  """A row for each chip of `fsdp`; what the pod has more of chips splits heads."""
  config = from_config_dict(spo_tree.get_config("qwen7b_math_32k"), Config)
  data, fsdp, _, found = mesh_shape(**dataclasses.asdict(config.mesh), devices=chips)
  assert found == tensor
  check_mesh(config, data * fsdp)
  assert sum(config.longest_segments) == config.packing.row_length == 32768


def test_variants_of_the_paper_differ_as_they_say():
  trees = {"rho1b_gsm8k": (6, 6, 6), "rho1b_gsm8k_456": (4, 5, 6), "rho1b_gsm8k_888": (8, 8, 8)}
  for variant, branches in trees.items():
    assert spo_tree.get_config(variant).rollout.branches == branches
  for variant, interval in {"rho1b_gsm8k": 5, "rho1b_gsm8k_int100": 100}.items():
    assert spo_chain.get_config(variant).partition.interval == interval
  assert grpo.get_config("rho1b_gsm8k").epochs == 2


def test_the_schedule_follows_the_number_of_updates():
  config = spo_tree.get_config("qwen1.5b_math")
  assert (config.optimizer.warmup_steps, config.optimizer.decay_steps) == (120, 4000)
  config.iterations, config.epochs = 100, 2
  assert (config.optimizer.warmup_steps, config.optimizer.decay_steps) == (24, 800)
  for method in (spo_tree, spo_chain, grpo):
    config = method.get_config()
    config.iterations, config.minibatches, config.epochs = 10, 3, 2
    assert (config.optimizer.warmup_steps, config.optimizer.decay_steps) == (0, 60)
  config = ppo.get_config("qwen1.5b_math")
  config.iterations, config.critic_optimizer.learning_rate = 100, 1e-5
  for optimizer in (config.optimizer, config.critic_optimizer):
    assert (optimizer.warmup_steps, optimizer.decay_steps) == (12, 400)
  assert config.optimizer.learning_rate == 1e-6
  config = restem.get_config()
  assert config.optimizer.decay_steps == 96
  config.iterations, config.minibatches, config.epochs = 10, 3, 2
  assert (config.optimizer.warmup_steps, config.optimizer.decay_steps) == (0, 6)


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("rollout.strategy", "forest", "strategy is 'forest', it must be one of: tree, chain, group"),
    ("rollout.branches", (2, 0, 2), "branches"),
    ("rollout.segment_tokens", (30, 30), "segment_tokens"),
    ("rollout.temperature", 0.0, "temperature"),
    ("rollout.top_p", 1.5, "top_p is 1.5"),
    ("rollout.prefill_chunk", -1, "rollout.prefill_chunk is -1, it must be 0 .* or more tokens"),
    ("rollout.prompts", 0, "config.rollout.prompts is 0, it must be positive"),
    ("rollout.parts", 0, "config.rollout.parts is 0, it must be positive"),
    ("rollout.parts", 7, "config.rollout.parts 7 must divide config.rollout.prompts 96"),
    ("rollout.prompt_buckets", (8, 8), r"prompt_buckets \(8, 8\) must increase, from 1 or more"),
    ("rollout.prompt_buckets", (0, 8), "prompt_buckets .* from 1 or more"),
    ("rollout.prompt_buckets", (8, 40), "must increase, .* less than max_prompt_tokens 40"),
    ("rollout.prompts", 9.5, "config.rollout.prompts is 9.5, it must be of type int"),
    ("loss.scaling", "white", "it must be one of: whiten, rescale, none"),
    ("loss.kl_estimator", "full", "kl_estimator"),
    ("loss.kl_estimator", "seq_control_variate", "kl_estimator"),
    ("warm_start_optimizer.decay_steps", 20, "decay_steps 20 must be 0 or more than warmup_steps"),
    ("advantage.kind", "rloo", "it must be one of: difference, normalized, leave_one_out"),
    ("new_model.kv_heads", 3, "heads 2 must be a multiple of kv_heads 3"),
    ("compute.dtype", "float16", "dtype"),
    ("compute.remat", True, "remat is True, it must be of type str; 'none' is what False was"),
    ("compute.remat", "all", "remat is 'all', it must be one of: none, blocks, dots"),
    ("compute.attention", "splash", "it must be one of: blocks, flash, cudnn"),
    ("packing.query_block", 64, "row_length 288 must be a multiple of query_block 64"),
    ("packing.key_block", 24, "query_block 32 must be a multiple of key_block 24"),
    ("packing.row_length", 64, "row_length 64 must hold the longest prompt and response"),
    ("packing.loss_length", 289, "loss_length is 289, it must be 0 .* to row_length 288"),
    (
      "data.template",
      "nope",
      "config.data.template is 'nope', it must be one of: plain, math_task",
    ),
    ("data.system", "Be brief.", "config.data.system is used by the template 'chat' alone"),
    ("data.answer_field", "label", "are of the data set 'json', not 'arithmetic'"),
    ("loss.epsilon", 0.2, "config.loss has no field 'epsilon', did you mean"),
  ],
)
def test_a_value_that_cannot_work_is_named(path, value, message):
  with pytest.raises(UserError, match=message):
    from_config_dict(changed(path, value), Config)


GROUP = {"rollout.strategy": "group"}
CRITIC = GROUP | {"critic.trunk": "own", "advantage.kind": "reward", "advantage.train_zero": True}
CHAIN = {"rollout.strategy": "chain"}
DPO = GROUP | {"loss.kind": "dpo_positive", "packing.row_length": 416}
CONSTANT = {"loss.normalization": "constant"}
REPLAY = {"replay.max_age": 8}
CORRECTED = {"loss.importance_cap": 2.0}


@pytest.mark.parametrize(
  ("works", "change", "message"),
  [
    (CRITIC, {"rollout.strategy": "tree"}, "config.critic estimates advantages from rewards"),
    (CRITIC, {"rollout.strategy": "chain"}, "config.critic estimates advantages from rewards"),
    (CRITIC, {"advantage.kind": "difference"}, "needs .* config.advantage.kind 'reward'"),
    (CRITIC, {"advantage.train_zero": False}, "config.critic .* train_zero"),
    (CRITIC, {"critic.trunk": "both"}, "it must be one of: none, own, shared"),
    (CRITIC, {"critic.target": "td"}, "it must be one of: return, lambda_return"),
    (CRITIC, {"critic.gamma": 1.1}, r"config.critic.gamma is 1.1, it must be in \[0, 1\]"),
    (CRITIC, {"critic.lam": -0.1}, r"config.critic.lam is -0.1, it must be in \[0, 1\]"),
    (CRITIC, {"critic.value_clip": 0.0}, "config.critic.value_clip is 0.0, it must be positive"),
    (
      CRITIC | {"restart": True},
      {"critic.trunk": "shared"},
      "config.restart begins every iteration with the first policy",
    ),
    (CRITIC, {"critic_optimizer.decay": "step"}, "it must be one of: cosine, linear"),
    (CRITIC | {"loss.kl_in": "reward"}, {"critic.trunk": "none"}, "'reward' needs a critic"),
    ({}, {"loss.kl_in": "reward"}, "'reward' needs a critic"),
    ({"loss.kl_control": "adaptive"}, {"loss.kl_coef": 0.0}, "needs a config.loss.kl_coef above 0"),
    (
      {"loss.kl_control": "adaptive", "loss.kl_horizon": 154},  # 96 prompts, 8 leaves each
      {"loss.kl_horizon": 153},
      "config.loss.kl_horizon 153 must be more than 0.2 times the 768 responses of an iteration",
    ),
    (
      GROUP | {"loss.kl_control": "adaptive", "loss.kl_horizon": 154},
      {"rollout.samples": 9},
      "config.loss.kl_horizon 154 must be more than 0.2 times the 864 responses of an iteration",
    ),
    ({}, {"loss.kl_target": 0.0}, "config.loss.kl_target is 0.0, it must be positive"),
    ({}, {"seed": -1}, "config.seed is -1, it must be in"),
    ({}, {"loss.kl_coef": float("nan")}, "config.loss.kl_coef is nan, it must be 0 or more"),
    ({}, {"loss.ratio_threshold": 0.0}, "config.loss.ratio_threshold is 0.0, it must be positive"),
    ({}, {"optimizer.b2": 1.0}, "config.optimizer.b2 is 1.0, it must be in .0, 1."),
    ({}, {"optimizer.learning_rate": float("inf")}, "learning_rate is inf, it must be finite"),
    ({}, {"new_model.kv_heads": 0}, "config.new_model.kv_heads is 0, it must be positive"),
    ({}, {"new_model.heads": 3}, "width 64 must be a multiple of heads 3, or `transformers`"),
    ({}, {"optimizer.warmup_steps": -1}, "config.optimizer.warmup_steps is -1, it must be 0 or"),
    ({}, {"optimizer.clip_norm": 0.0}, "config.optimizer.clip_norm is 0.0, it must be positive"),
    ({}, {"critic_optimizer.learning_rate": 0.0}, "critic_optimizer.learning_rate is 0.0, it must"),
    (CHAIN | {"advantage.train_probes": True}, GROUP, "train_probes and pool_trajectory are of"),
    (CHAIN | {"advantage.pool_trajectory": True}, GROUP, "are of config.rollout.strategy 'chain'"),
    (DPO, {"rollout.strategy": "tree"}, "'dpo_positive' compares responses of a group"),
    (DPO, {"packing.row_length": 384}, "config.packing.row_length of at least 408"),
    (DPO, {"loss.dpo_beta": 0.0}, "config.loss.dpo_beta is 0.0, it must be positive"),
    (CONSTANT, CHAIN, "'constant' divides by the number of trained segments"),
    (CONSTANT, {"loss.segment_weights": "share"}, "'constant' .* segment_weights 'share'"),
    (REPLAY, CRITIC, "config.replay keeps segments without their siblings"),
    (REPLAY, DPO, "it does not go with .* 'dpo_positive'"),
    (REPLAY, {"loss.segment_weights": "share"}, "it does not go with .* segment_weights 'share'"),
    (REPLAY, {"loss.normalization": "sequence"}, "it does not go with .* 'sequence'"),
    (REPLAY, {"replay.max_age": -1}, "config.replay.max_age is -1, it must be 0"),
    (REPLAY, {"replay.segments_per_question": 0}, "it must be positive"),
    (CORRECTED, {"loss.importance_cap": 0.5}, "must be 0 .off. or at least 1"),
    (CORRECTED, {"loss.kind": "likelihood"}, "config.loss.importance_cap corrects the old"),
    (
      CORRECTED | {"rollout.weights": "int8"},
      {"loss.importance_cap": 0.0},
      "cache 'full' draw from",
    ),
    (CORRECTED | {"rollout.cache": "int8"}, {"loss.importance_cap": 0.0}, "set config.loss.import"),
    (CORRECTED, {"rollout.weights": "int4"}, "rollout.weights .* must be one of: full, int8"),
    (CORRECTED, {"restart": True}, "config.loss.importance_cap .* nor with config.restart"),
    ({}, {"loss.kind": "dpo"}, "it must be one of: ppo_clip, likelihood, dpo_positive"),
    ({}, {"loss.normalization": "row"}, "it must be one of: token, sequence, constant"),
    ({}, {"loss.segment_weights": "leaf"}, "it must be one of: equal, share"),
    ({}, {"loss.kl_control": "linear"}, "it must be one of: fixed, adaptive"),
    ({}, {"loss.kl_in": "both"}, "it must be one of: loss, reward"),
    ({}, {"advantage.best_of": 0}, "config.advantage.best_of is 0, it must be positive"),
    ({}, {"partition.parts": 0}, "config.partition.parts is 0, it must be positive"),
  ],
)
def test_what_does_not_go_together_is_named(works, change, message):
  from_config_dict(all_changed(works), Config)
  with pytest.raises(UserError, match=message):
    from_config_dict(all_changed(works | change), Config)


def test_a_penalty_that_no_response_is_given_is_named():
  config = changed("advantage.grade_unfinished", True)
  from_config_dict(config, Config)
  config.advantage.unfinished_penalty = -1.0
  with pytest.raises(UserError, match="config.advantage.unfinished_penalty is -1.0, but"):
    from_config_dict(config, Config)


def test_a_chain_needs_no_branches():
  config = changed("rollout.max_response_tokens", 8)
  with pytest.raises(UserError, match="branches"):
    from_config_dict(config, Config)
  config.rollout.strategy = "chain"
  assert from_config_dict(config, Config).longest_segments == (40, 8)


def test_a_missing_field_is_named():
  config = default_config()
  config.unlock()
  del config.loss["kl_coef"]
  with pytest.raises(UserError, match="config.loss.kl_coef is missing"):
    from_config_dict(config, Config)


def test_a_misspelt_override_is_named_with_the_nearest_field():
  check_field(Config, "rollout.top_p")
  with pytest.raises(UserError, match="config has no field 'iteratons', did you mean 'iterations'"):
    check_field(Config, "iteratons")
  with pytest.raises(UserError, match="config.rollout has no field 'zzz', it has: strategy"):
    check_field(Config, "rollout.zzz")
  with pytest.raises(UserError, match="has no field 'x'"):
    check_field(Config, "seed.x")


def test_parse_variant_takes_the_default_for_none():
  assert parse_variant(None, {"a": 1}, "a") == "a"
  assert parse_variant("", {"a": 1}, "a") == "a"


def test_batches_that_the_mesh_cannot_divide_are_named():
  config = Config()
  check_mesh(config, 8)
  with pytest.raises(UserError, match="config.rollout.prompts 96 cannot be divided .* are 5"):
    check_mesh(config, 5)
  config = from_config_dict(changed("rollout.parts", 24), Config)
  check_mesh(config, 4)
  with pytest.raises(UserError, match="parts 24: the 4 prompts of each cannot .* are 8: use few"):
    check_mesh(config, 8)


def test_sampling_ahead_is_for_one_device():
  check_ahead(Config(), 8)
  config = from_config_dict(changed("rollout.ahead", True), Config)
  check_ahead(config, 1)
  with pytest.raises(UserError, match="safe on one device, and the mesh has 8: set it to False"):
    check_ahead(config, 8)


def test_budgets_and_longest_tree():
  config = Config()
  assert config.budgets == (13, 13, 20)
  prompt = config.rollout.max_prompt_tokens
  assert config.longest_segments == (prompt, 13, 13, 20)
  assert config.longest_tree == prompt + 2 * 13 + 4 * 13 + 8 * 20
  group = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, strategy="group"))
  assert group.branches == (8,) and group.budgets == (46,)
  assert group.longest_tree == prompt + 8 * 46
