"""What a compiled program sends between chips, read from its text.

Compilers split a program into computations that call one another. A collective counts as often as
there are ways to reach it from the program's entry; a loop's body is one way, however often it
turns. Both branches of a condition count.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}  # other names end with their bits, as "f32" does
# Kind -> bytes that a chip receives for each byte of the result, among so many chips, in a ring.
_RECEIVED = {
  "all-gather": lambda chips: (chips - 1) / chips,
  "all-reduce": lambda chips: 2 * (chips - 1) / chips,
  "reduce-scatter": lambda chips: chips - 1,
  "all-to-all": lambda chips: (chips - 1) / chips,
  "collective-permute": lambda chips: 1,
}
# Started by an instruction whose result names the operand first.
_OPERAND_FIRST = ("all-gather-start", "collective-permute-start")

_LAYOUT = re.compile(r"(?<=\])\{[^{}]*\}")
_NOTE = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_ONE_CALLEE = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_CALLEES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
# A loop that counts from 0, as those of JAX do, says its number of turns here.
_LIMIT = re.compile(r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FIRST_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUP_SIZES = re.compile(r"replica_groups=\[\d+,(\d+)\]")
# replica_groups=mesh['x'=4,'y'=64], device_ids=([64,4]T(1,0)) {'x'}; 'x':(2)4 is 4 of an axis.
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{}]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_GROUP_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")
_CHIPS = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """The collectives of a kind in loops of a depth."""

  kind: str
  loops: int  # that they lie in: 0, none; 1, a loop; 2, a loop of a loop
  count: float  # in one turn of each loop
  received: float  # bytes that a chip receives in one turn of each loop
  # Likewise, times the turns of those loops whose number of turns the program states.
  received_in_stated_turns: float


SUMS = ("count", "received", "received_in_stated_turns")


class _Sent(NamedTuple):
  kind: str
  received: float
  channel: str  # the parts of one that fusions share have the same


class _Call(NamedTuple):
  computation: str
  fused: bool
  loop: bool
  turns: int | None  # that a loop says it has
  condition: str  # of a loop


class _Computation:
  """What a computation sends and calls, and up to where it counts if it is a loop's condition."""

  def __init__(self):
    self.sent: list[_Sent] = []
    self.calls: list[_Call] = []
    self.constants: dict[str, int] = {}
    self.limit: int | None = None

  def read(self, line: str, chips: int) -> None:
    """Takes in an instruction."""
    found = _INSTRUCTION.match(_NOTE.sub("", _LAYOUT.sub("", line)))
    if not found:
      return
    shapes, name = found.groups()
    kind = name.removesuffix("-start")
    if kind in _RECEIVED:
      size = _size(_elements(shapes)[1] if name in _OPERAND_FIRST else shapes)
      received = size * _RECEIVED[kind](_group_size(line, chips))
      channel = _CHANNEL.search(line)
      self.sent.append(_Sent(kind, received, channel[1] if channel else ""))
    elif not name.endswith(("-done", "-update")):
      self.calls.extend(_calls(name, line))
    if constant := _CONSTANT.search(line):
      self.constants[constant[1]] = int(constant[2])
    if limit := _LIMIT.search(line):
      self.limit = self.constants.get(limit[1])


def collectives(text: str) -> list[Collective]:
  """The collectives of a program.

  An asynchronous one is counted where it starts; one that fusions share, each with a part of it,
  once, by its channel. Bytes are those of rings: of an all-gather and an all-to-all what other
  chips hold of the result, of an all-reduce that twice, of a reduce-scatter the results of the
  other chips, of a permute the result.

  Args:
    text: HLO, as `compiled.as_text()`.

  Returns:
    Sums by kind and depth of loops, most bytes first.
  """
  computations, entry = _parse(text)
  sums = collections.defaultdict(lambda: [0, 0.0, 0.0])

  def walk(name: str, fused: bool, seen: set[str], loops: int, turns: int) -> None:
    """`seen` are channels of fusions in this turn of the loop."""
    for kind, received, channel in computations[name].sent:
      if not (fused and channel and channel in seen):
        found = sums[kind, loops]
        found[0] += 1
        found[1] += received
        found[2] += received * turns
      if fused:
        seen.add(channel)
    for call in computations[name].calls:
      if call.loop:
        stated = call.turns or computations[call.condition].limit or 1
        walk(call.computation, False, set(), loops + 1, turns * stated)
      else:
        walk(call.computation, fused or call.fused, seen, loops, turns)

  walk(entry, False, set(), 0, 1)
  found = [Collective(kind, loops, *values) for (kind, loops), values in sums.items()]
  return sorted(found, key=lambda one: -one.received_in_stated_turns)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  """The computations by name, and the name of the first one that runs."""
  computations, entry, current = {}, "", None
  chips = max(map(int, _CHIPS.findall(text[: text.find("\n")])), default=1)
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations[header[2]] = _Computation()
      entry = header[2] if header[1] else entry
    elif current:
      current.read(line, chips)
  return computations, entry


def _calls(name: str, line: str) -> Iterator[_Call]:
  stated, condition = _TURNS.search(line), _CONDITION.search(line)
  callees = _ONE_CALLEE.findall(line)
  for several in _CALLEES.findall(line):
    callees += [callee.strip().removeprefix("%") for callee in several.split(",")]
  for callee in callees:
    yield _Call(
      callee,
      name == "fusion",
      name == "while",
      int(stated[1]) if stated else None,
      condition[1] if condition else "",
    )


def _group_size(line: str, chips: int) -> int:
  """Chips that take part in a collective together: all, where it does not name them."""
  if found := _GROUP_SIZES.search(line):
    return int(found[1])
  if found := _MESH.search(line):
    sizes = dict(_MESH_AXIS.findall(found[1]))
    return math.prod(int(part or sizes[axis]) for axis, part in _GROUP_AXIS.findall(found[2]))
  found = _FIRST_GROUP.search(line)
  return len(found[1].split(",")) if found and found[1] else chips


def _elements(shapes: str) -> list[str]:
  """The elements of a tuple, which may be tuples."""
  elements, depth = [""], 0
  for letter in shapes[1:-1]:
    depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
    if letter == "," and depth == 0:
      elements.append("")
    else:
      elements[-1] += letter
  return elements


def _size(shapes: str) -> float:
  """Bytes of a shape, or of all shapes of a tuple."""
  return sum(
    math.prod(int(size) for size in sizes.split(",") if size) * _bits(dtype) / 8
    for dtype, sizes in _SHAPE.findall(shapes)
  )


def _bits(dtype: str) -> int:
  """Of a number; "f8e4m3fn" and its like have 8."""
  return _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
