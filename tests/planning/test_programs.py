"""The programs of a plan are those of a run, lowered in its shapes, dtypes and shardings."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from spo_jax import evaluation
from spo_jax.algorithms.partition import make_partition
from spo_jax.infra.mesh import make_mesh, shard_batch, shard_rows
from spo_jax.models.decoder import DecoderConfig
from spo_jax.planning import measure, programs
from spo_jax.run import make_sampler
from spo_jax.sampling import sampler as samplers
from spo_jax.sampling import stepping, strategies, verbs
from spo_jax.training.packing import PackConfig, pack
from spo_jax.training.step import init_state
from tests.planning.setups import CONFIG, MODEL, setup_of
from tests.tiny import shard_params, tiny_config, tiny_params, tiny_prompts
from tests.training.forests import own_segments, tree_forest


def placed(tree):
  """Shapes, dtypes and the part of each array that one device holds."""
  part = lambda x: x.sharding.shard_shape(x.shape)
  return [(x.shape, x.dtype, part(x)) for x in jax.tree.leaves(tree)]


def test_batch_and_state_are_those_of_a_run():
  setup = setup_of()
  rng = np.random.default_rng(0)
  forest = tree_forest(rng, (2, 2), (3, 3), prompts=(3, 2) * 5)
  shape = PackConfig(32, rows=8, query_block=16, key_block=8, key_blocks=4, min_micro_batches=2)
  advantages = np.ones(len(forest.parent), np.float32)
  packed, _ = pack(forest, advantages, own_segments(forest), shape)
  batch = shard_batch(setup.mesh, packed)
  assert placed(programs.abstract_batch(shape, CONFIG, setup.mesh)) == placed(batch)
  state = init_state(shard_params(MODEL, setup.mesh, tiny_params(MODEL)), CONFIG.optimizer)
  assert placed(programs.abstract_state(setup)) == placed(state)


GROUP = {"strategy": "group"}
CRITIC = {"rollout": GROUP, "advantage": {"kind": "reward", "train_zero": True}}
PLAIN = ["prepare", "train_step"]


@pytest.mark.parametrize(
  ("sections", "names"),
  [
    ({"loss": {"segment_weights": "share", "kl_control": "adaptive"}}, PLAIN),
    ({"loss": {"forward_kl_coef": 0.1, "importance_cap": 2.0}}, PLAIN),
    ({"loss": {"kind": "dpo_positive", "kl_coef": 0.0}, "rollout": GROUP}, PLAIN),
    (CRITIC | {"critic": {"trunk": "shared"}}, PLAIN),
    (CRITIC | {"critic": {"trunk": "own"}, "loss": {"kl_in": "reward"}}, [*PLAIN, "critic_step"]),
  ],
)
def test_the_updates_of_every_method_are_lowered(sections, names):
  found = []
  for program in programs.update_programs(setup_of(**sections)):
    program.lower()
    found.append(program.name)
  assert found == names


class Recorder:
  """Stands for a jitted verb: notes what it is called or lowered with."""

  static = (DecoderConfig, stepping.DecodeConfig, NamedSharding, int, str)

  def __init__(self, name, calls, result=None):
    self.name, self.calls, self.result = name, calls, result

  def lower(self, *args):
    static = [arg for arg in args if isinstance(arg, self.static)]
    arrays = [arg for arg in args if not isinstance(arg, self.static)]
    self.calls.append((self.name, static, placed(arrays)))

  def __call__(self, *args):
    self.lower(*args)
    return self.result(*args)


def pretend_verbs(setup):
  """Verbs that compute nothing; all continuations are as long as they may be."""

  def zeros(verb, *args):
    shapes = jax.eval_shape(verb, *args)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

  def prefill(cfg, rows, chunk, kind, params, tokens, lengths):
    verb = lambda *args: verbs.prefill(cfg, *args, kind=kind)
    return shard_rows(setup.mesh, zeros(verb, params, tokens, lengths))

  def decode(cfg, decode_cfg, params, prefix, groups):
    segments = zeros(lambda: stepping.empty_segments(cfg, decode_cfg, *groups.starts.shape))
    segments = segments._replace(lengths=np.asarray(groups.limits), tokens=segments.tokens + 2)
    segments = segments if decode_cfg.keep_cache else segments._replace(cache=())
    return shard_rows(setup.mesh, segments)

  def extend(rows, *args):
    return shard_rows(setup.mesh, zeros(verbs.extend, *args))

  return {"jit_prefill": prefill, "jit_decode": decode, "jit_extend": extend}


@pytest.fixture
def calls(monkeypatch):
  """Returns a function of (setup, planned programs, sampling): the calls of both, recorded."""

  def record(setup, planned, sample):
    wanted, got = [], []
    for name, result in pretend_verbs(setup).items():
      monkeypatch.setattr(programs, name, Recorder(name, wanted))
      monkeypatch.setattr(samplers, name, Recorder(name, got, result))
    for program in planned(setup):
      program.lower()
    sample(shard_params(MODEL, setup.mesh, tiny_params(MODEL)))
    return wanted, got

  return record


def sampler_of(setup, as_rollout):
  rollout = setup.config.rollout
  return make_sampler(
    rollout,
    setup.model,
    setup.mesh,
    programs.STOP_IDS,
    temperature=rollout.temperature,
    as_rollout=as_rollout,
  )


INT8 = {"weights": "int8", "cache": "int8"}


@pytest.mark.parametrize(
  ("strategy", "kinds"), [("tree", {}), ("chain", {}), ("group", {}), ("tree", INT8)]
)
def test_the_verbs_are_called_as_planned(strategy, kinds, calls):
  setup = setup_of(
    rollout={
      "strategy": strategy,
      "prompts": 16,
      "parts": 2,
      "temperature": 0.7,
      "top_k": 5,
      "prefill_chunk": 4,
    }
    | kinds
  )
  rollout, sampler = setup.config.rollout, sampler_of(setup, as_rollout=True)
  prompts = tiny_prompts(8)

  def chain(params):
    strategies.grow_chain(
      sampler,
      params,
      prompts,
      samples=rollout.samples,
      probes=rollout.probes,
      max_new_tokens=rollout.max_response_tokens,
      partition=make_partition(
        "fixed", threshold=1.0, interval=1, length=5, parts=1, delimiter_ids=()
      ),
      cuts_per_group=rollout.cuts_per_group,
    )

  def tree(params):
    branches, budgets = setup.config.branches, setup.config.budgets
    strategies.grow_tree(sampler, params, prompts, branches=branches, budgets=budgets)

  wanted, got = calls(setup, programs.sampling_programs, chain if strategy == "chain" else tree)
  assert got == wanted
  assert wanted[0][0] == "jit_prefill" and 4 in wanted[0][1]


def test_the_verbs_of_evaluation_are_called_as_planned(calls):
  """12 problems on 8 devices are a batch of 16, where 24 are allowed."""
  setup = setup_of(rollout={"top_k": 5, "prefill_chunk": 4}, eval={"prompts": 12, "batch": 24})
  config = setup.config

  class Task:
    prompts = staticmethod(lambda records, key, name: tiny_prompts(len(records)))

  def evaluate(params):
    responses = evaluation.respond(
      Task(),
      sampler_of(setup, as_rollout=False),
      params,
      [{}] * config.eval.prompts,
      jax.random.key(0),
      samples=1,
      max_new_tokens=config.rollout.max_response_tokens,
      batch=config.eval.batch,
    )
    assert len(list(responses)) == 1

  wanted, got = calls(setup, programs.evaluation_programs, evaluate)
  assert got == wanted


def test_without_a_kl_term_no_reference_policy_lies_beside_a_program():
  setup = setup_of(loss={"kl_coef": 0.0})
  every = (programs.update_programs, programs.sampling_programs, programs.evaluation_programs)
  beside = {program.name: program.beside for kind in every for program in kind(setup)}
  state = programs.abstract_state(setup)
  assert beside["train_step"] is None and beside["prefill"] == (state.opt_state, None)


def test_a_step_does_not_gather_the_logits():
  """Each of 8 chips has an eighth of the vocabulary for all rows, and wants half for its own."""
  vocab = 1024
  mesh = make_mesh(1, 4, 2)
  model = tiny_config(layers=1, vocab_size=vocab, ffn=32)
  setup = programs.Setup(CONFIG, model.on(mesh), mesh)
  _, level = programs.decoded_levels(CONFIG)[-1]
  logits = programs.decoded_at_once(CONFIG, level) * level.n * vocab * 4
  sent = {one.kind: one.received for one in measure.measure(programs.decode_step(setup)).sent}
  assert sent["all-gather"] < logits / 8
  assert sent["all-to-all"] <= logits / 8
