"""The text of a compiled program (HLO), read into computations of instructions.

Compilers split a program into computations that call one another: a loop has one for its body and
one for its condition, a fusion one for what it computes at once.
"""

import dataclasses
import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}  # other names end with their bits, as "f32" does

# Operations whose result names the operand before what they give.
OPERAND_FIRST = ("all-gather-start", "collective-permute-start")

_NOTE = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r" ([\w\-]+)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
# An array: dtype, sizes, and in its layout the number of the memory that it lies in.
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{[^{}]*?(?:S\((\d+)\))?\})?")
_ONE_CALLEE = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_CALLEES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHIPS = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")


class Array(NamedTuple):
  """An array of a shape, or of a tuple of them."""

  size: float  # bytes
  memory: int  # 0: that of the chip; others are nearer, or the host's


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation."""

  name: str
  shapes: str  # of the result, as written
  op: str
  operands: tuple[str, ...]  # names
  rest: str  # of the line, behind the bracket that operands follow
  root: bool  # the result of the computation

  @property
  def arrays(self) -> list[Array]:
    """Those of the result, in order."""
    return arrays(self.shapes)

  def calls(self) -> list[str]:
    """The computations that it names."""
    callees = _ONE_CALLEE.findall(self.rest)
    for several in _CALLEES.findall(self.rest):
      callees += [callee.strip().removeprefix("%") for callee in several.split(",")]
    return callees


class Module(NamedTuple):
  """A compiled program, as HLO calls it."""

  computations: dict[str, list[Instruction]]
  entry: str  # the computation that runs first
  chips: int

  def turns(self, loop: Instruction) -> int | None:
    """How often a loop turns, where the program says it: a loop that counts from 0, as those of JAX
    do, is compared with a constant."""
    if stated := _TURNS.search(loop.rest):
      return int(stated[1])
    condition = self.computations[_CONDITION.search(loop.rest)[1]]
    (root,) = (one for one in condition if one.root)
    if root.op != "compare" or "direction=LT" not in root.rest:
      return None
    limits = {one.name: _constant(one) for one in condition}
    return limits.get(root.operands[-1])


def _constant(instruction: Instruction) -> int | None:
  """The whole number that it is, if it is one."""
  is_one = instruction.op == "constant" and instruction.shapes.startswith("s32[]")
  return int(instruction.rest.partition(")")[0]) if is_one else None


def parse(text: str) -> Module:
  """Reads a program, as `compiled.as_text()`."""
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations[header[2]] = []
      entry = header[2] if header[1] else entry
    elif current is not None and (instruction := _read(_NOTE.sub("", line))):
      current.append(instruction)
  chips = max(map(int, _CHIPS.findall(text[: text.find("\n")])), default=1)
  return Module(computations, entry, chips)


def _read(line: str) -> Instruction | None:
  found = _INSTRUCTION.match(line)
  if found is None:
    return None
  root, name, said = found.groups()
  end = _closing(said[1:]) + 2 if said.startswith("(") else said.find(" ")
  operation = _OPERATION.match(said[end:])
  if operation is None:
    return None
  op, rest = operation.groups()
  operands = tuple(_NAME.findall(rest[: _closing(rest)]))
  return Instruction(name, said[:end], op, operands, rest, bool(root))


def _closing(text: str) -> int:
  """Where the bracket is closed that was opened before."""
  depth = 1
  for i, letter in enumerate(text):
    depth += {"(": 1, ")": -1}.get(letter, 0)
    if depth == 0:
      return i
  return len(text)


def elements(shapes: str) -> list[str]:
  """The elements of a tuple, which may be tuples."""
  found, depth = [""], 0
  for letter in shapes[1:-1]:
    depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
    if letter == "," and depth == 0:
      found.append("")
    else:
      found[-1] += letter
  return found


def arrays(shapes: str) -> list[Array]:
  """The arrays of a shape as it is written."""
  return [
    Array(math.prod(int(n) for n in sizes.split(",") if n) * _bits(dtype) / 8, int(memory or 0))
    for dtype, sizes, memory in _ARRAY.findall(shapes)
  ]


def size(shapes: str) -> float:
  """Bytes of a shape, or of all shapes of a tuple."""
  return sum(array.size for array in arrays(shapes))


def _bits(dtype: str) -> int:
  """Of a number; "f8e4m3fn" and its like have 8."""
  return _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])


def named(instructions: list[Instruction]) -> dict[str, Instruction]:
  """Instructions by name."""
  return {one.name: one for one in instructions}
