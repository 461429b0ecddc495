"""What a compiled program sends between chips, read from its text.

A collective counts as often as there are ways to reach it from the program's entry; a loop's body
is one way, however often it turns. Both branches of a condition count.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

from spo_jax.planning import hlo

# Kind -> bytes that a chip receives for each byte of the result, among so many chips, in a ring.
_RECEIVED = {
  "all-gather": lambda chips: (chips - 1) / chips,
  "all-reduce": lambda chips: 2 * (chips - 1) / chips,
  "reduce-scatter": lambda chips: chips - 1,
  "all-to-all": lambda chips: (chips - 1) / chips,
  "collective-permute": lambda chips: 1,
}

_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_FIRST_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUP_SIZES = re.compile(r"replica_groups=\[\d+,(\d+)\]")
# replica_groups=mesh['x'=4,'y'=64], device_ids=([64,4]T(1,0)) {'x'}; 'x':(2)4 is 4 of an axis.
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{}]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_GROUP_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")


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
  module = hlo.parse(text)
  sums = collections.defaultdict(lambda: [0, 0.0, 0.0])

  def walk(name: str, fused: bool, seen: set[str], loops: int, turns: int) -> None:
    """`seen` are channels of fusions in this turn of the loop."""
    for instruction in module.computations[name]:
      sent = _sent(instruction, module.chips)
      if sent is not None:
        if not (fused and sent.channel and sent.channel in seen):
          found = sums[sent.kind, loops]
          found[0] += 1
          found[1] += sent.received
          found[2] += sent.received * turns
        if fused:
          seen.add(sent.channel)
      elif instruction.op == "while":
        stated = module.turns(instruction) or 1
        for callee in instruction.calls():
          walk(callee, False, set(), loops + 1, turns * stated)
      elif not instruction.op.endswith(("-done", "-update")):
        for callee in instruction.calls():
          walk(callee, fused or instruction.op == "fusion", seen, loops, turns)

  walk(module.entry, False, set(), 0, 1)
  found = [Collective(kind, loops, *values) for (kind, loops), values in sums.items()]
  return sorted(found, key=lambda one: -one.received_in_stated_turns)


def _sent(instruction: hlo.Instruction, chips: int) -> _Sent | None:
  """What an instruction sends, if it is a collective or starts one."""
  kind = instruction.op.removesuffix("-start")
  if kind not in _RECEIVED:
    return None
  result = instruction.shapes
  if instruction.op in hlo.OPERAND_FIRST:
    result = hlo.elements(result)[1]
  received = hlo.size(result) * _RECEIVED[kind](_group_size(instruction.rest, chips))
  channel = _CHANNEL.search(instruction.rest)
  return _Sent(kind, received, channel[1] if channel else "")


def _group_size(line: str, chips: int) -> int:
  """Chips that take part in a collective together: all, where it does not name them."""
  if found := _GROUP_SIZES.search(line):
    return int(found[1])
  if found := _MESH.search(line):
    sizes = dict(_MESH_AXIS.findall(found[1]))
    return math.prod(int(part or sizes[axis]) for axis, part in _GROUP_AXIS.findall(found[2]))
  found = _FIRST_GROUP.search(line)
  return len(found[1].split(",")) if found and found[1] else chips
