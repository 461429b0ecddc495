"""A plan compiles what a run calls, in its shapes; says what fits; mistakes are one line."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import spo_tree
from configs.experiments import EXPERIMENTS
from spo_jax import plan
from spo_jax.algorithms.partition import make_partition
from spo_jax.config import Config, EvalConfig, MeshConfig, PackingConfig, RolloutConfig
from spo_jax.config_check import from_config_dict
from spo_jax.errors import UserError
from spo_jax.infra.mesh import make_mesh
from spo_jax.infra.topology import GIB, open_topology
from spo_jax.models.decoder import count_params
from spo_jax.models.families import config_from_hf
from spo_jax.models.known import KNOWN_MODELS
from spo_jax.planning import measure, programs, report
from spo_jax.sampling import sampler as samplers
from spo_jax.sampling import strategies, verbs
from spo_jax.training.packing import PackConfig, pack
from spo_jax.training.step import init_state
from tests.tiny import shard_params, tiny_config, tiny_params, tiny_prompts
from tests.tiny_run import REPOSITORY, TINY, environment
from tests.training.forests import own_segments, tree_forest

MODEL = tiny_config(layers=1)
ROLLOUT = RolloutConfig(
  prompts=8,
  max_prompt_tokens=6,
  max_response_tokens=10,
  branches=(2, 2),
  segment_tokens=(4,),
  samples=2,
  probes=2,
  slots=8,
)
CONFIG = Config(
  rollout=ROLLOUT,
  packing=PackingConfig(32, rows=8, query_block=16, key_block=8, logprob_chunk=32),
  eval=EvalConfig(prompts=8, batch=8),
  mesh=MeshConfig(data=1, fsdp=8),
)


def setup_of(**rollout) -> programs.Setup:
  mesh = make_mesh(1, 8, 1)
  config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(ROLLOUT, **rollout))
  return programs.Setup(config, MODEL.on(mesh), mesh)


def shapes(tree):
  return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def placed(tree):
  """Shapes, dtypes and the part of each array that one device holds."""
  part = lambda x: x.sharding.shard_shape(x.shape)
  return [(x.shape, x.dtype, part(x)) for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def planned():
  notes = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, "planned_decoder", lambda config: MODEL)
    found = plan.make_plan(CONFIG, open_topology("cpu:8", 1.0), (), True, notes.append)
  return found, notes


def test_batch_and_state_are_those_of_a_run():
  setup = setup_of()
  rng = np.random.default_rng(0)
  forest = tree_forest(rng, (2, 2), (3, 3), prompts=(3, 2) * 5)
  shape = PackConfig(32, rows=8, query_block=16, key_block=8, key_blocks=4, min_micro_batches=2)
  advantages = np.ones(len(forest.parent), np.float32)
  packed, _ = pack(forest, advantages, own_segments(forest), shape)
  assert shapes(programs.abstract_batch(shape, setup.mesh)) == shapes(packed)
  state = init_state(shard_params(MODEL, setup.mesh, tiny_params(MODEL)), CONFIG.optimizer)
  assert placed(programs.abstract_state(setup)) == placed(state)


class Recorder:
  """Stands for a jitted verb: notes the shapes that it is called or lowered with."""

  def __init__(self, name, calls, result=None):
    self.name, self.calls, self.result = name, calls, result

  def lower(self, *args):
    arrays = [arg for arg in args if isinstance(arg, jax.ShapeDtypeStruct | tuple | dict)]
    static = [arg for arg in args if isinstance(arg, verbs.DecodeConfig)]
    self.calls.append((self.name, static, shapes(arrays)))

  def __call__(self, *args):
    arrays = [arg for arg in args if isinstance(arg, jax.Array | np.ndarray | tuple | dict)]
    static = [arg for arg in args if isinstance(arg, verbs.DecodeConfig)]
    self.calls.append((self.name, static, shapes(arrays)))
    return self.result(*args)


def pretend_decode(cfg, decode_cfg, params, prefix, groups):
  """All continuations are as long as they may be."""
  segments = verbs.empty_segments(cfg, decode_cfg, *groups.starts.shape)
  segments = segments._replace(lengths=groups.limits, tokens=segments.tokens + 2)
  return segments if decode_cfg.keep_cache else segments._replace(cache=())


@pytest.mark.parametrize("strategy", ["tree", "chain", "group"])
def test_the_verbs_are_called_as_planned(strategy, monkeypatch):
  setup = setup_of(strategy=strategy)
  rollout = setup.config.rollout
  wanted, got = [], []
  empty = lambda shape: np.zeros(shape.shape, shape.dtype)

  def pretend_prefill(cfg, rows, params, tokens, lengths):
    prefix = programs._prefix(setup, *tokens.shape)
    return verbs.Prefix(tokens, lengths, jax.tree.map(empty, prefix.cache))

  pretended = {
    "jit_prefill": pretend_prefill,
    "jit_decode": pretend_decode,
    "jit_extend": lambda rows, *args: verbs.extend(*args),
  }
  for name, result in pretended.items():
    monkeypatch.setattr(programs, name, Recorder(name, wanted))
    monkeypatch.setattr(samplers, name, Recorder(name, got, result))
  for program in programs.sampling_programs(setup):
    program.lower()
  params, prompts = tiny_params(MODEL), tiny_prompts(rollout.prompts)
  sampler = programs._sampler(setup, truncate=True)
  if strategy == "chain":
    strategies.grow_chain(
      sampler,
      params,
      prompts,
      samples=rollout.samples,
      probes=rollout.probes,
      max_new_tokens=rollout.max_response_tokens,
      partition=make_partition("fixed", threshold=1.0, interval=1, length=5, delimiter_ids=()),
      cuts_per_group=rollout.cuts_per_group,
    )
  else:
    branches, budgets = setup.config.branches, setup.config.budgets
    strategies.grow_tree(sampler, params, prompts, branches=branches, budgets=budgets)
  assert got == wanted


def test_a_plan_measures_every_program(planned):
  found, notes = planned
  names = [f"{p.phase}: {p.name}" for p in found.programs]
  sampling = ["prefill", "decode level 1", "extend level 1", "decode level 2"]
  assert names == (
    ["update: prepare", "update: train_step"]
    + [f"sampling: {name}" for name in sampling]
    + ["evaluation: prefill", "evaluation: decode"]
  )
  assert found.all_fit and len(notes) >= len(names)
  params = count_params(tiny_params(MODEL)) * 4 / 8
  step = next(p for p in found.programs if p.name == "train_step")
  assert found.state()["parameters"] == params and found.state()["reference policy"] == params
  assert step.beside == params and 3 * params <= step.aliased < step.arguments
  text = "\n".join(report.lines(found))
  assert "It fits" in text and "mesh data 1 x fsdp 8 x tensor 1" in text
  assert [entry.field for entry in found.largest] == ["packing.rows", "rollout.slots"]
  rows, slots = found.largest
  assert slots.value == 16 and slots.all_there_is and rows.value > 8 and rows.value % 8 == 0


def test_what_does_not_fit_is_told_with_what_to_change(planned):
  found, _ = planned
  step = next(p for p in found.programs if p.name == "train_step")
  small = dataclasses.replace(found.topology, chip_bytes=int(step.total) - 1)
  text = "\n".join(report.lines(dataclasses.replace(found, topology=small)))
  assert "It does not fit" in text and "update: fewer config.packing.rows (at least 8" in text
  assert "more chips" in text and "sampling: fewer" not in text and "state alone" not in text
  tiny = dataclasses.replace(found.topology, chip_bytes=1000)
  text = "\n".join(report.lines(dataclasses.replace(found, topology=tiny)))
  assert "sampling: fewer config.rollout.slots" in text and "the state alone takes" in text


def test_nothing_is_compiled_where_the_state_does_not_fit(monkeypatch):
  monkeypatch.setattr(plan, "planned_decoder", lambda config: MODEL)
  found = plan.make_plan(CONFIG, open_topology("cpu:8", 1e-6), (), True, pytest.fail)
  assert not found.programs and not found.all_fit
  assert "the state alone takes" in "\n".join(report.lines(found))


def test_parameters_are_grouped_over_layers():
  setup = setup_of()
  setup = dataclasses.replace(setup, model=dataclasses.replace(setup.model, layers=3))
  kinds = {kind["name"]: kind for kind in report.parameters(setup)}
  gate = {"count": 3, "shape": [16, 24], "split": ["fsdp", "-"], "on_a_chip": [2, 24]}
  assert kinds["block_*/gate"] == gate | {"name": "block_*/gate"}
  assert kinds["embedding"]["count"] == 1


def test_rows_stay_on_their_device(planned):
  """Where weights are not gathered, every device computes all rows."""
  step = next(p for p in planned[0].programs if p.name == "train_step")
  setup = setup_of()
  left = dataclasses.replace(setup, model=MODEL)
  (alone,) = measure.measure_all(left, programs.update_programs, (), print, "train_step")
  assert step.temporaries < 0.7 * alone.temporaries


def sized(total: float, compiled: bool = True) -> measure.Measured:
  return measure.Measured("train_step", "update", 1.0, 0, 0, 0, total, 0, compiled)


def test_layers_are_extrapolated_along_a_line():
  found = measure._extend_line(sized(30.0), sized(50.0), (2, 4), at=10)
  assert found.total == 110.0 and found.seconds == 2.0
  assert measure._extend_line(sized(50.0), sized(30.0), (2, 4), at=10).total == 50.0


def test_the_largest_value_is_the_largest_that_compiles_and_fits():
  search = lambda cost, **more: plan.find_largest(
    "packing.rows", cost, cost(16), 16, 8, chip_bytes=1000, **more
  )
  assert search(lambda rows: sized(100 + 10 * rows)).value == 88
  assert search(lambda rows: sized(100 + 10 * rows + (rows > 80) * 500)).value == 80
  assert search(lambda rows: sized(100 + 10 * rows, compiled=rows < 80)).value == 72
  assert search(lambda rows: sized(2000.0 + rows)).value == 0
  entry = search(lambda slots: sized(100 + 10 * slots), most=40)
  assert entry.value == 40 and entry.all_there_is


def test_what_the_compiler_says_of_memory_is_read():
  read = measure._needed_bytes
  assert read("memory required for HLO temporaries (298.12G) exceeds available") == 298.12 * GIB
  assert read("Used 20.5M of 15.75G hbm") == 20.5 * 2**20
  assert read("Mosaic failed") is None


COUNTS = {
  "realtreetune/rho-1b-sft-GSM8K": 1_100_048_384,
  "realtreetune/rho-1b-sft-MATH": 1_100_048_384,
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
  "Qwen/Qwen2.5-1.5B": 1_543_714_304,
  "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
  "realtreetune/deepseekmath-7b-sft-GSM8K": 6_910_365_696,
  "realtreetune/deepseekmath-7b-sft-MATH-v2": 6_910_365_696,
}


def test_the_papers_models_are_known_with_their_sizes():
  assert {experiment.model for experiment in EXPERIMENTS.values()} == set(COUNTS)
  mesh = make_mesh(1, 1, 1)
  for name, count in COUNTS.items():
    setup = programs.Setup(CONFIG, config_from_hf(KNOWN_MODELS[name]), mesh)
    assert count_params(programs.abstract_params(setup)) == count, name


def test_a_folder_needs_a_config_json_alone(tmp_path):
  hf = KNOWN_MODELS["Qwen/Qwen2.5-0.5B-Instruct"]
  (tmp_path / "config.json").write_text(json.dumps(hf))
  found = plan.planned_decoder(dataclasses.replace(CONFIG, model=str(tmp_path)))
  assert found == config_from_hf(hf)
  with pytest.raises(UserError, match="'who/knows' is no folder.*give a folder"):
    plan.planned_decoder(dataclasses.replace(CONFIG, model="who/knows"))


def test_mistakes_are_one_line(monkeypatch):
  for name in ("v9:2x2", "v5e", "v5e:4xq", ""):
    with pytest.raises(UserError, match="is unknown: give KIND:GRID with a kind of v5e, v5p, v6e"):
      open_topology(name)
  with pytest.raises(UserError, match="cpu:N needs the memory of a device: --chip_gib"):
    open_topology("cpu:8")
  with pytest.raises(UserError, match="cpu:99: this process has 8 CPU devices"):
    open_topology("cpu:99", 1.0)
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(UserError, match=r'not installed: pip install -e "\.\[plan\]"'):
    open_topology("v5e:4x4")
  for wrong in (["2"], ["2", "x"], ["2", "2"], ["0", "2"]):
    with pytest.raises(UserError, match="--layers=.* must be two different positive numbers"):
      plan._parse_layers(wrong)


def test_the_command_writes_json_and_says_by_its_status_that_it_does_not_fit(tmp_path):
  fields = TINY | {
    "new_model.layers": 1,
    "rollout.strategy": "group",
    "rollout.samples": 2,
    "rollout.slots": 8,
    "mesh.data": -1,
  }
  path = tmp_path / "plan.json"
  done = subprocess.run(
    [sys.executable, "-m", "spo_jax.plan", "--config=configs/spo_tree.py", "--topology=cpu:8"]
    + [f"--config.{name}={value}" for name, value in fields.items()]
    + ["--chip_gib=0.0005", "--nolargest", f"--json={path}"],
    cwd=REPOSITORY,
    env=environment() | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == plan.DOES_NOT_FIT_STATUS, done.stderr
  found = json.loads(path.read_text())
  assert found["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1} and not found["fits"]
  assert {p["name"] for p in found["programs"]} == {"prepare", "train_step", "prefill", "decode"}
  assert all(p["total"] > 0 and p["seconds"] > 0 for p in found["programs"])
  assert found["state"]["moments"] > found["state"]["parameters"] > 0
  assert "It does not fit" in done.stdout and "compiled update/train_step" in done.stderr


def test_the_command_line_goes_before_the_config():
  there = dataclasses.replace(Config(), topology="v5e:2x4")
  assert plan.chosen_topology(None, there) == "v5e:2x4"
  assert plan.chosen_topology("v5p:2x2x2", there) == "v5p:2x2x2"
  with pytest.raises(UserError, match="names no topology: give --topology"):
    plan.chosen_topology(None, Config())


def test_the_planned_decoder_computes_as_the_config_says():
  config = spo_tree.get_config("qwen1.5b_math")
  decoder = plan.planned_decoder(from_config_dict(config, Config))
  assert (decoder.attention, decoder.dtype, decoder.remat) == ("flash", "bfloat16", True)
  assert decoder.layers == 28
