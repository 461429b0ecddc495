"""Programs compiled: their memory per chip, and what chips send one another."""

import dataclasses
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
from jax.errors import JaxRuntimeError

from spo_jax.infra.topology import GIB
from spo_jax.planning.collectives import SUMS, Collective, collectives
from spo_jax.planning.programs import Program, Setup
from spo_jax.planning.traffic import traffic

_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
# What the compiler says of a program that its chip has no room for.
_NEEDS = (
  re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\)"),
  re.compile(r"Used ([\d.]+)([KMGT]) of"),
)


@dataclasses.dataclass(frozen=True)
class Measured:
  """Bytes per chip of a program, and the seconds that its compilation took."""

  name: str
  phase: str
  seconds: float
  arguments: float
  outputs: float
  aliased: float  # of the outputs, written where arguments lie
  temporaries: float
  beside: float  # what else lies on the chip meanwhile
  compiled: bool = (
    True  # False: the compiler refused it for its memory; temporaries are what it says
  )
  # The body of a loop counts once.
  flops: float = 0.0  # as the compiler counts them
  moved: float = 0.0  # bytes, see `traffic`
  moved_in_loops: float = 0.0  # of these
  # Of one layer, where two numbers of them were compiled.
  layer_flops: float | None = None
  layer_moved: float | None = None
  sent: tuple[Collective, ...] = ()

  @property
  def path(self) -> str:
    """As `Program.path`."""
    return f"{self.phase}/{self.name}"

  @property
  def total(self) -> float:
    """What the chip must hold while the program runs."""
    held = self.arguments + self.outputs - self.aliased
    return held + self.temporaries + self.beside


_SIZES = ("arguments", "outputs", "aliased", "temporaries", "beside")
_COSTS = ("flops", "moved", "moved_in_loops")
_COSTS_OF_LAYER = ("flops", "moved")


def bytes_per_chip(tree) -> int:
  """Bytes of shapes with shardings on a chip, in the layout and padding that the compiler gives."""
  leaves = jax.tree.leaves(tree)
  if not leaves:
    return 0
  program = jax.jit(lambda *arrays: (), keep_unused=True).lower(*leaves)
  return program.compile().memory_analysis().argument_size_in_bytes


def measure(program: Program) -> Measured:
  """Compiles a program.

  Raises:
    JaxRuntimeError: if it cannot be compiled for another reason than memory.
  """
  began = time.perf_counter()
  beside = bytes_per_chip(program.beside)
  lowered = program.lower()
  try:
    compiled = lowered.compile()
  except JaxRuntimeError as error:
    needs = _needed_bytes(str(error))
    if needs is None:
      raise
    seconds = time.perf_counter() - began
    return Measured(program.name, program.phase, seconds, 0, 0, 0, needs, beside, compiled=False)
  seconds = time.perf_counter() - began
  sizes, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text()
  moved = traffic(text)
  return Measured(
    program.name,
    program.phase,
    seconds,
    sizes.argument_size_in_bytes,
    sizes.output_size_in_bytes,
    sizes.alias_size_in_bytes,
    sizes.temp_size_in_bytes,
    beside,
    flops=cost.get("flops", 0.0),
    moved=sum(moved.values()),
    moved_in_loops=sum(moved.values()) - moved[0],
    sent=tuple(collectives(text)),
  )


def _needed_bytes(message: str) -> float | None:
  for pattern in _NEEDS:
    if found := pattern.search(message):
      return float(found[1]) * _UNITS[found[2]]
  return None


def measure_all(
  setup: Setup,
  programs: Callable[[Setup], Iterator[Program]],
  layers: tuple[int, ...],
  note: Callable[[str], None],
  only: Collection[str] = (),
) -> list[Measured]:
  """Compiles programs of a run.

  Args:
    setup: the run.
    programs: one of the generators of `programs.py`.
    layers: () compiles the model; two numbers compile it with so many layers each, and the sizes
      are the line through the two, at the model's own number. Of some programs the model itself is
      compiled in any case, see `Program.whole`.
    note: tells the user a line.
    only: the paths of the programs that are wanted; () all.
  """
  wanted = lambda count: [
    program for program in programs(_with_layers(setup, count)) if not only or program.path in only
  ]

  def compiled(program: Program, count: int) -> Measured:
    result = measure(program)
    note(
      f"compiled {result.path}, {count} layers: {result.seconds:.0f} s, "
      f"{result.total / GIB:.2f} GiB at once"
    )
    return result

  every = setup.model.layers
  ends = [
    {program.name: compiled(program, count) for program in wanted(count) if not program.whole}
    for count in layers
  ]
  return [
    compiled(program, every)
    if program.whole or not layers
    else _extend_line(*(end[program.name] for end in ends), layers, every)
    for program in wanted(every)
  ]


def _with_layers(setup: Setup, count: int) -> Setup:
  return dataclasses.replace(setup, model=dataclasses.replace(setup.model, layers=count))


def _extend_line(a: Measured, b: Measured, layers: tuple[int, ...], at: int) -> Measured:
  """Sizes at a number of layers; seconds are those that the two compilations took.

  Where layers take turns with one buffer the line may fall: no size is less than was compiled.
  """
  share = (at - layers[0]) / (layers[1] - layers[0])

  def size(name: str) -> float:
    one, other = getattr(a, name), getattr(b, name)
    return max(one + share * (other - one), one, other)

  line = {name: size(name) for name in (*_SIZES, *_COSTS)}
  compiled = a.compiled and b.compiled
  if compiled:
    of_layer = lambda name: (getattr(b, name) - getattr(a, name)) / (layers[1] - layers[0])
    line |= {f"layer_{name}": of_layer(name) for name in _COSTS_OF_LAYER}
  sent = _sent_on_line(a.sent, b.sent, share)
  return dataclasses.replace(a, **line, seconds=a.seconds + b.seconds, compiled=compiled, sent=sent)


def _sent_on_line(
  a: Sequence[Collective], b: Sequence[Collective], share: float
) -> tuple[Collective, ...]:
  """Collectives by kind and depth; what one of the two programs does not have is 0 of it."""
  pairs = [{(one.kind, one.loops): one for one in sent} for sent in (a, b)]
  found = []
  for key in dict.fromkeys((*pairs[1], *pairs[0])):
    one, other = (sent.get(key, Collective(*key, 0, 0.0, 0.0)) for sent in pairs)
    on_line = lambda name, one=one, other=other: (
      getattr(one, name) + share * (getattr(other, name) - getattr(one, name))
    )
    values = {name: max(0.0, on_line(name)) for name in SUMS}
    found.append(dataclasses.replace(one, **values))
  return tuple(found)
