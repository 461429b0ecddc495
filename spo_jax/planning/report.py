"""What a plan says: tables for the screen, the same as JSON, and advice where it does not fit."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from spo_jax.infra.mesh import row_shards
from spo_jax.infra.topology import GIB, Topology
from spo_jax.planning.measure import Measured, bytes_per_chip
from spo_jax.planning.minimum import Cost
from spo_jax.planning.programs import Setup, abstract_state

MIB = 2**20

_ADVICE = {
  "update": "fewer config.packing.rows (at least {shards}, one a chip), a smaller "
  "config.packing.row_length or logprob_chunk, config.compute.remat=blocks",
  "sampling": "fewer config.rollout.slots, more config.rollout.parts, fewer "
  "config.rollout.prompts, where it is prefill a (smaller) config.rollout.prefill_chunk",
  "evaluation": "a smaller config.eval.batch, fewer config.rollout.slots, a (smaller) "
  "config.rollout.prefill_chunk",
}
_SENT_NOTE = (
  "MiB: that a chip receives, in one turn of each loop; in stated turns: times the turns of the "
  "loops that say how many"
)


@dataclasses.dataclass(frozen=True)
class Largest:
  """The largest value of a field with which its program fits, found by compiling it."""

  field: str
  value: int  # 0: none fits
  total: float  # bytes per chip at once, with that value
  all_there_is: bool  # a larger value would change nothing


@dataclasses.dataclass(frozen=True)
class Plan:
  """What was found."""

  setup: Setup
  topology: Topology
  layers: tuple[int, ...]  # that were compiled, if not the model's own
  programs: Sequence[Measured]
  largest: Sequence[Largest]
  costs: Sequence[Cost] = ()

  def fits(self, program: Measured) -> bool:
    """Whether a chip has room for a program and for what must lie beside it."""
    return program.compiled and program.total <= self.topology.chip_bytes

  @property
  def all_fit(self) -> bool:
    """Whether the run fits."""
    return self.state_fits and all(self.fits(program) for program in self.programs)

  @property
  def state_fits(self) -> bool:
    """Whether a chip has room for what lies there during the whole run."""
    return sum(self.state().values()) <= self.topology.chip_bytes

  def state(self) -> dict[str, int]:
    """Bytes per chip of what lies there during the whole run."""
    state = abstract_state(self.setup)
    params = bytes_per_chip(state.params)
    return {
      "parameters": params,
      "moments": bytes_per_chip(state.opt_state),
      "reference policy": params if self.setup.config.loss.kl_coef else 0,
    }


def parameters(setup: Setup) -> list[dict[str, Any]]:
  """The parameters by kind: layers that are alike are one line."""
  kinds: dict[tuple, dict[str, Any]] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_state(setup).params)[0]:
    names = ["block_*" if p.key.startswith("block_") else p.key for p in path]
    split = lambda axis: axis is not None and setup.mesh.shape[axis] > 1
    spec = [axis if split(axis) else "-" for axis in leaf.sharding.spec]
    kind = {
      "name": "/".join(names),
      "shape": list(leaf.shape),
      "split": spec + ["-"] * (len(leaf.shape) - len(spec)),
      "on_a_chip": list(leaf.sharding.shard_shape(leaf.shape)),
    }
    kinds.setdefault((kind["name"], leaf.shape), kind | {"count": 0})["count"] += 1
  return list(kinds.values())


def as_json(plan: Plan) -> dict[str, Any]:
  """The plan, sizes in bytes per chip."""
  mesh = plan.setup.mesh
  return {
    "topology": plan.topology.name,
    "chips": len(plan.topology.devices),
    "chip_bytes": plan.topology.chip_bytes,
    "mesh": dict(mesh.shape),
    "model": plan.setup.config.model,
    "layers": plan.setup.model.layers,
    "layers_compiled": list(plan.layers) or [plan.setup.model.layers],
    "state": plan.state(),
    "programs": [
      dataclasses.asdict(p) | {"total": p.total, "fits": plan.fits(p)} for p in plan.programs
    ],
    "largest": [dataclasses.asdict(entry) for entry in plan.largest],
    "costs": [dataclasses.asdict(cost) | {"ratio": cost.ratio} for cost in plan.costs],
    "parameters": parameters(plan.setup),
    "fits": plan.all_fit,
  }


def lines(plan: Plan) -> list[str]:
  """The plan as text."""
  chip = plan.topology.chip_bytes
  unit, name = (GIB, "GiB") if chip >= GIB else (MIB, "MiB")
  size = lambda count: f"{count / unit:.2f}"
  setup = plan.setup
  axes = " x ".join(f"{axis} {count}" for axis, count in setup.mesh.shape.items())
  out = [
    f"{setup.config.model or 'new model'}: {setup.model.layers} layers, width {setup.model.width}",
    f"{plan.topology.name}: {len(plan.topology.devices)} chips of {size(chip)} {name}, mesh {axes}",
  ]
  if plan.layers:
    a, b = plan.layers
    whole = "updates and extend" if setup.model.scan_layers else "extend"
    line = f"sizes are on the line through compilations with {a} and {b} layers"
    out.append(f"{line}, but for {whole}, compiled with all")
  state = plan.state()
  parts = ", ".join(f"{part} {size(count)}" for part, count in state.items())
  out += ["", f"state: {parts}; {size(sum(state.values()))} {name} a chip", ""]
  rows = [("program", "compile s", "arguments", "outputs", "aliased", "temporaries", "beside")]
  rows[0] += (f"at once, {name}", "of chip", "")
  for p in plan.programs:
    known = [size(x) if p.compiled else "?" for x in (p.arguments, p.outputs, p.aliased)]
    rows.append(
      (f"{p.phase}: {p.name}", f"{p.seconds:.0f}", *known, size(p.temporaries), size(p.beside))
      + (size(p.total), f"{p.total / chip:.0%}", "" if plan.fits(p) else "does not fit")
    )
  if plan.programs:
    out += _aligned(rows)
    out += ["", "beside: what lies on the chip meanwhile and is no argument of the program", ""]
  sent = [row for p in plan.programs for row in _sent_rows(p)]
  if sent:
    head = ("collectives", "kind", "in", "count", "MiB", "MiB in stated turns")
    out += [*_aligned([head, *sent]), "", _SENT_NOTE, ""]
  out += [_largest_line(entry, size, name) for entry in plan.largest]
  out += [""] if plan.largest else []
  if plan.costs:
    out += [*_aligned([("cost", "unit", "found", "minimum", "ratio"), *map(_cost, plan.costs)]), ""]
  rows = [("parameter", "count", "shape", "split over", "on a chip")]
  text = lambda values: " x ".join(str(value) for value in values)
  for kind in parameters(setup):
    rows.append(
      (kind["name"], str(kind["count"]), *(text(kind[k]) for k in ("shape", "split", "on_a_chip")))
    )
  return [*out, *_aligned(rows), "", *_verdict(plan, size, name)]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
  """Columns, the first to the left and the others to the right."""
  widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
  align = lambda cell, i: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
  return ["  ".join(align(cell, i) for i, cell in enumerate(row)).rstrip() for row in rows]


def _sent_rows(program: Measured) -> list[tuple[str, ...]]:
  """The collectives of a program."""
  where = ("the program", "a loop", "a loop in a loop", "a loop, three deep")
  return [
    (
      f"{program.phase}: {program.name}",
      one.kind,
      where[min(one.loops, len(where) - 1)],
      f"{one.count:.0f}",
      *(f"{received / MIB:.4g}" for received in (one.received, one.received_in_stated_turns)),
    )
    for one in program.sent
  ]


def _cost(cost: Cost) -> tuple[str, ...]:
  row = (cost.name, cost.unit, f"{cost.found:.4g}")
  return row + (("", "") if cost.minimum is None else (f"{cost.minimum:.4g}", f"{cost.ratio:.2f}"))


def _largest_line(entry: Largest, size, name: str) -> str:
  if not entry.value:
    return f"largest config.{entry.field} that fits: none"
  more = ", which is all there is" if entry.all_there_is else ""
  return f"largest config.{entry.field} that fits: {entry.value} ({size(entry.total)} {name}){more}"


def _verdict(plan: Plan, size, name: str) -> list[str]:
  if plan.all_fit:
    worst = max(plan.programs, key=lambda p: p.total)
    free = size(plan.topology.chip_bytes - worst.total)
    return [f"It fits: {free} {name} a chip are free during {worst.phase}: {worst.name}."]
  shards = row_shards(plan.setup.mesh)
  out = ["It does not fit. What would help:"]
  if not plan.state_fits:
    out.append(f"  the state alone takes {size(sum(plan.state().values()))} {name} a chip")
  for phase, advice in _ADVICE.items():
    if any(p.phase == phase and not plan.fits(p) for p in plan.programs):
      out.append(f"  {phase}: {advice.format(shards=shards)}")
  out.append("  all of it: more chips, all of them on config.mesh.fsdp (-1)")
  return out
