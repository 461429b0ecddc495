"""What a compiled program moves between a chip's memory and its processor, read from its text.

The compiler's own figure ("bytes accessed") counts an array in full wherever a part of it is
fetched or overwritten, and counts what stays in the memory of the core, so that it tells several
times of what a decode step moves. Here an array counts that lies in the chip's memory, where it is
read and where it is written; a slice or rows of it count alone; what is updated in place costs the
update. Loops count once, with their bodies, and both branches of a condition. Tiles that are moved
for a part of them, and what the processor rereads, are not known.
"""

import collections
from collections.abc import Sequence

from spo_jax.planning import hlo
from spo_jax.planning.hlo import Instruction

# Of these nothing moves, or it is counted where it starts, or inside what they call.
_MOVES_NOTHING = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
  *("partition-id", "replica-id", "opt-barrier", "while", "conditional", "call"),
)
_NO_TARGETS = ('"AllocateBuffer"', '"ConcatBitcast"')  # of custom calls, likewise
_PARTS = ("slice", "dynamic-slice", "gather")  # read what they give, not their first operand


def traffic(text: str) -> dict[int, float]:
  """Bytes that a chip moves, by depth of loops, in one turn of each.

  Args:
    text: HLO, as `compiled.as_text()`.
  """
  module = hlo.parse(text)
  moved = collections.defaultdict(float)

  def walk(name: str, loops: int) -> None:
    computation = module.computations[name]
    by_name = hlo.named(computation)
    for instruction in computation:
      moved[loops] += _moved(module, by_name, instruction)
      if instruction.op in ("while", "conditional", "call"):
        for callee in instruction.calls():
          walk(callee, loops + (instruction.op == "while"))

  walk(module.entry, 0)
  return dict(moved)


def _moved(module: hlo.Module, by_name: dict[str, Instruction], one: Instruction) -> float:
  """Bytes that an instruction moves."""
  if one.op in _MOVES_NOTHING or one.op.endswith(("-done", "-update")):
    return 0
  operands = [by_name[name] for name in one.operands if name in by_name]
  if one.op == "custom-call" and any(target in one.rest for target in _NO_TARGETS):
    return 0
  if one.op == "fusion":
    return _moved_by_fusion(module, operands, one)
  if one.op == "copy-start":  # (copy, operand, token)
    return sum(array.size for array in one.arrays[:2] if array.memory == 0)
  if one.op == "slice-start":  # ((operand), slice, token)
    whole, part = one.arrays[:2]
    return part.size * sum(array.memory == 0 for array in (whole, part))
  if one.op in hlo.OPERAND_FIRST:
    return _held(one)
  if one.op == "dynamic-update-slice":  # in place
    update = operands[1]
    return _held(update) + _size(update) * _in_memory(one)
  if one.op in _PARTS:
    source, *indices = operands
    return _size(one) * _in_memory(source) + _held(one) + sum(map(_held, indices))
  return _held(one) + sum(map(_held, operands))


def _moved_by_fusion(
  module: hlo.Module, operands: Sequence[Instruction], one: Instruction
) -> float:
  (name,) = one.calls()
  computation = module.computations[name]
  reads = sum(
    min(_held(operand), _read(module, computation, i))
    for i, operand in enumerate(operands)
    if _held(operand)
  )
  return reads + _written(module, computation, one.arrays)


def _read(module: hlo.Module, computation: list[Instruction], index: int) -> float:
  """Bytes that a fusion reads of a parameter: all, if more than parts of it are used."""
  (parameter,) = (
    one for one in computation if one.op == "parameter" and one.rest.startswith(f"{index})")
  )
  names, total = {parameter.name}, 0.0
  for one in computation:
    places = [i for i, name in enumerate(one.operands) if name in names]
    if not places:
      continue
    if one.op == "bitcast" and not one.root:
      names.add(one.name)
    elif one.op in _PARTS and places == [0]:
      total += _size(one)
    elif one.op == "fusion":
      (inner,) = one.calls()
      total += sum(_read(module, module.computations[inner], i) for i in places)
    elif one.op != "dynamic-update-slice" or places != [0]:
      return _size(parameter)
  return total


def _written(
  module: hlo.Module, computation: list[Instruction], results: Sequence[hlo.Array]
) -> float:
  """Bytes that a fusion writes to the chip's memory: of what it updates in place, the update."""
  by_name = hlo.named(computation)
  (root,) = (one for one in computation if one.root)
  if root.op == "fusion":
    (inner,) = root.calls()
    return _written(module, module.computations[inner], results)
  roots = [by_name[name] for name in root.operands] if root.op == "tuple" else [root]
  if len(roots) < len(results):  # several of one operation
    return sum(array.size for array in results if array.memory == 0)
  total = 0.0
  for array, result in zip(results, roots, strict=True):
    while result.op == "bitcast":
      result = by_name[result.operands[0]]
    updates = result.op == "dynamic-update-slice"
    size = _size(by_name[result.operands[1]]) if updates else array.size
    total += size * (array.memory == 0)
  return total


def _held(instruction: Instruction) -> float:
  """Bytes of its result that lie in the chip's memory."""
  return sum(array.size for array in instruction.arrays if array.memory == 0)


def _size(instruction: Instruction) -> float:
  return hlo.size(instruction.shapes)


def _in_memory(instruction: Instruction) -> bool:
  return instruction.arrays[0].memory == 0
