"""A plan before a run: `python -m spo_jax.plan --config=configs/spo_tree.py:qwen1.5b_math
--topology=v5e:4x4` compiles the run's programs for a machine that is not there, and says whether
they fit.

Exit status: 0 it fits, 1 it does not, 2 a mistake of the user's.
"""

import dataclasses
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable, Collection

from absl import flags

from spo_jax import command_line
from spo_jax.config import Config
from spo_jax.config_check import from_config_dict
from spo_jax.config_rules import check_ahead, check_mesh
from spo_jax.data.tokenizer import load_tokenizer
from spo_jax.errors import UserError
from spo_jax.infra.mesh import make_mesh, packed_row_shards, row_shards
from spo_jax.infra.topology import Topology, open_topology
from spo_jax.models.attention import check_backend
from spo_jax.models.decoder import DecoderConfig
from spo_jax.models.families import config_from_hf
from spo_jax.models.known import KNOWN_MODELS
from spo_jax.models.pretrained import find_pretrained
from spo_jax.planning import minimum, programs, report
from spo_jax.planning.measure import Measured, measure_all
from spo_jax.run import new_decoder

DOES_NOT_FIT_STATUS = 1
_TRIES = 3  # compilations to verify the largest value of a field, the last on a second line

_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "v5e:4x4, v5p:2x2x2, ..., or cpu:N; else that of the config"
)
_CHIP_GIB = flags.DEFINE_float("chip_gib", None, "memory of a chip, in place of the known one")
_LAYERS = flags.DEFINE_list(
  "layers", [], "two numbers from 2: compile so many, draw a line to the rest"
)
_PROGRAMS = flags.DEFINE_list(
  "programs", [], "compile these alone, such as update/train_step; looks for no largest then"
)
_LARGEST = flags.DEFINE_bool("largest", True, "look for the largest packing.rows, rollout.slots")
_COSTS = flags.DEFINE_bool("costs", False, "compare what programs cost with the least they could")
_JSON = flags.DEFINE_string("json", None, "file for the plan as JSON")


def plan_from_flags() -> int:
  """Compiles, prints, writes. Returns the exit status."""
  config = from_config_dict(command_line.CONFIG.value, Config)
  topology = open_topology(chosen_topology(_TOPOLOGY.value, config), _CHIP_GIB.value)
  note = lambda text: print(text, file=sys.stderr, flush=True)
  chosen, layers = _PROGRAMS.value, _parse_layers(_LAYERS.value)
  if chosen and _COSTS.value:
    raise UserError("--costs compares all programs: leave --programs out")
  look = _LARGEST.value and not chosen
  if chosen:
    note(f"what follows is of {', '.join(chosen)} alone")
  plan = make_plan(config, topology, layers, look, note, _COSTS.value, chosen)
  print("\n".join(report.lines(plan)))
  if _JSON.value:
    try:
      pathlib.Path(_JSON.value).write_text(json.dumps(report.as_json(plan), indent=2) + "\n")
    except OSError as error:
      raise UserError(f"--json: '{_JSON.value}' cannot be written: {error.strerror}") from error
  return 0 if plan.all_fit else DOES_NOT_FIT_STATUS


def chosen_topology(named: str | None, config: Config) -> str:
  """The topology of the command line, else that of the config.

  Raises:
    UserError: if neither names one.
  """
  name = named or config.topology
  if not name:
    raise UserError("this config names no topology: give --topology, such as v5e:4x4")
  return name


def _parse_layers(values: list[str]) -> tuple[int, ...]:
  layers = tuple(int(value) for value in values if value.isdigit())
  wrong = len(layers) != len(values) or len(layers) not in (0, 2) or len(set(layers)) != len(layers)
  # The last layer of an update, where only states that the loss reads go on, is unlike the others.
  if wrong or min(layers, default=2) < 2:
    raise UserError(f"--layers={','.join(values)} must be two different numbers from 2: 2,4")
  return layers


def make_plan(
  config: Config,
  topology: Topology,
  layers: tuple[int, ...],
  look_for_largest: bool,
  note: Callable[[str], None],
  with_costs: bool = False,
  chosen: Collection[str] = (),
) -> report.Plan:
  """Compiles the programs of a run for a topology; none, if the state alone does not fit.

  Args:
    config: the run.
    topology: the machine.
    layers: see `measure_all`.
    look_for_largest: also look for the largest micro-batch and the most slots.
    note: tells the user a line.
    with_costs: also compare costs with their minimum, see `planning/minimum.py`.
    chosen: the programs that are compiled, each as PHASE/NAME; () all. A choice goes with neither
      of the two above.

  Raises:
    UserError: if the model or a chosen program is unknown, or the config does not go with the
      machine.
  """
  mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=topology.devices)
  shards = row_shards(mesh)
  check_mesh(config, shards, packed_row_shards(mesh))
  check_ahead(config, mesh.size)
  model = planned_decoder(config)
  check_backend(
    model.attention,
    topology.devices[0],
    dtype=model.dtype,
    head_dim=model.head_dim,
    cap=model.attention_cap,
    group=model.heads // model.kv_heads,
    packed_blocks=(config.packing.query_block, config.packing.key_block),
  )
  setup = programs.Setup(config, model.on(mesh), mesh)
  nothing = report.Plan(setup, topology, layers, [], [])
  if not nothing.state_fits:
    return nothing
  check_chosen(setup, chosen)
  compile_ = lambda setup, kind, only=chosen: measure_all(setup, kind, layers, note, only)
  update = compile_(setup, programs.update_programs)
  sampling = compile_(setup, programs.sampling_programs)
  evaluation = compile_(setup, programs.evaluation_programs)
  largest = []
  if look_for_largest:

    def with_rows(rows: int) -> Measured:
      packing = dataclasses.replace(config.packing, rows=rows)
      changed = dataclasses.replace(setup, config=dataclasses.replace(config, packing=packing))
      return compile_(changed, programs.update_programs, [update[-1].path])[0]

    def with_slots(slots: int) -> Measured:
      rollout = dataclasses.replace(config.rollout, slots=slots)
      changed = dataclasses.replace(setup, config=dataclasses.replace(config, rollout=rollout))
      return compile_(changed, programs.sampling_programs, [sampling[-1].path])[0]

    room = topology.chip_bytes
    largest = [
      find_largest("packing.rows", with_rows, update[-1], config.packing.rows, shards, room),
      find_largest(
        "rollout.slots",
        with_slots,
        sampling[-1],
        config.rollout.slots,
        shards,
        room,
        most=decoded_groups(config),
      ),
    ]
  costs = []
  if with_costs:
    (step,) = compile_(setup, lambda setup: iter([programs.decode_step(setup)]))
    (train,) = (program for program in update if program.name == "train_step")
    costs = minimum.costs(setup, step, train)
  return report.Plan(setup, topology, layers, [*update, *sampling, *evaluation], largest, costs)


def check_chosen(setup: programs.Setup, chosen: Collection[str]) -> None:
  """Checks names of programs against those of a run.

  Raises:
    UserError: if the run has no such program.
  """
  known = [program.path for kind in programs.KINDS for program in kind(setup)]
  for path in chosen:
    if path not in known:
      raise UserError(f"this run has no program '{path}', it has: {', '.join(known)}")


def planned_decoder(config: Config) -> DecoderConfig:
  """The decoder of a config, from config.json alone where it is a published one."""
  if config.model:
    if pathlib.Path(config.model).expanduser().is_dir():
      hf = find_pretrained(config.model).hf
    elif config.model in KNOWN_MODELS:
      hf = KNOWN_MODELS[config.model]
    else:
      raise UserError(
        f"config.model '{config.model}' is no folder, and its config.json is not among those that "
        "plans know: give a folder with that file"
      )
    return config_from_hf(hf, **dataclasses.asdict(config.compute))
  with tempfile.TemporaryDirectory() as folder:
    tokenizer = load_tokenizer(config.data.tokenizer, work_dir=folder)
  return new_decoder(config.new_model, config.compute, len(tokenizer))


def decoded_groups(config: Config) -> int:
  """Groups of the last and largest call of `decode` of an iteration."""
  if config.rollout.strategy == "chain":
    return config.part_prompts * config.rollout.samples
  return config.part_prompts * math.prod(config.branches[:-1])


def find_largest(
  field: str,
  measure_with: Callable[[int], Measured],
  now: Measured,
  value: int,
  step: int,
  chip_bytes: int,
  most: int | None = None,
) -> report.Largest:
  """The largest value of a field that fits: a line through two sizes, verified by compiling.

  Where neither what the line says nor a step less fits, sizes bend upwards, and the last try is on
  the line through the largest that fits.

  Args:
    field: its name.
    measure_with: compiles the field's program with a value.
    now: what came of `value`.
    value: the field's value.
    step: what values must be a multiple of.
    chip_bytes: memory of a chip.
    most: the value above which nothing changes.
  """
  value = min(value, most or value)
  known = {value: now}
  fits = lambda v: known[v].compiled and known[v].total <= chip_bytes

  def full(a: int, b: int) -> float:
    """Where the line through two values reaches the chip's memory."""
    slope = (known[b].total - known[a].total) / (b - a)
    steps = (chip_bytes - known[a].total) / slope / step if slope > 0 else math.inf
    return a + math.floor(steps) * step if steps < math.inf else steps

  other = step if value > step else 2 * step
  guess = math.inf
  if most is None or other <= most:
    known[other] = measure_with(other)
    guess = full(value, other)
  if most is not None:
    guess = min(guess, most)
  elif guess == math.inf:
    guess = value
  for attempt in range(_TRIES):
    if guess < step:
      break
    if guess not in known:
      known[guess] = measure_with(guess)
    if fits(guess):
      return report.Largest(field, guess, known[guess].total, guess == most)
    below = max((v for v in known if fits(v)), default=0)
    bent = full(below, guess) if attempt and below else math.inf
    guess = min(guess - step, bent)
  best = max((v for v in known if fits(v)), default=0)
  return report.Largest(field, best, known[best].total if best else 0.0, best == most)


if __name__ == "__main__":
  sys.exit(command_line.run_command(sys.argv, Config, plan_from_flags))
