"""Game of 24: all sets of four numbers from 1 to 13 of which +, -, *, / and brackets make 24."""

import functools
import itertools
from fractions import Fraction

TARGET = 24
LARGEST = 13  # a king


def solvable() -> dict[tuple[int, ...], str]:
  """Every solvable set, ascending, with one expression that makes 24."""
  sets = itertools.combinations_with_replacement(range(1, LARGEST + 1), 4)
  found = {numbers: solve(numbers) for numbers in sets}
  return {numbers: expression for numbers, expression in found.items() if expression}


def solve(numbers: tuple[int, ...]) -> str | None:
  """An expression that uses each of the numbers once and is exactly 24; None if there is none."""
  for few, many in _halves(numbers):
    reachable = _reachable(many)
    for a, a_text in _reachable(few).items():
      # What the other half must be, by the operation that joins them. Not a - b: where a negative b
      # can be had, so can -b, and a + (-b) is among them.
      needed = [
        (TARGET - a, "{a}+{b}"),
        (TARGET + a, "{b}-{a}"),
        (a * TARGET, "{b}/{a}"),
      ]
      if a != 0:
        needed += [(TARGET / a, "{a}*{b}"), (a / TARGET, "{a}/{b}")]
      for b, form in needed:
        # b / a with a = 0 looks for b = 0, and 0 / 0 is no number.
        if b in reachable and not (a == 0 and form == "{b}/{a}"):
          return form.format(a=a_text, b=reachable[b])
  return None


@functools.cache
def _reachable(numbers: tuple[int, ...]) -> dict[Fraction, str]:
  """Every value that an expression of all the numbers has, with one such expression each."""
  if len(numbers) == 1:
    return {Fraction(numbers[0]): str(numbers[0])}
  values = {}
  for few, many in _halves(numbers):
    for (a, a_text), (b, b_text) in itertools.product(
      _reachable(few).items(), _reachable(many).items()
    ):
      values.setdefault(a + b, f"({a_text}+{b_text})")
      values.setdefault(a * b, f"({a_text}*{b_text})")
      values.setdefault(a - b, f"({a_text}-{b_text})")
      values.setdefault(b - a, f"({b_text}-{a_text})")
      if b != 0:
        values.setdefault(a / b, f"({a_text}/{b_text})")
      if a != 0:
        values.setdefault(b / a, f"({b_text}/{a_text})")
  return values


def _halves(numbers: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
  """Ways to part the numbers in two, the smaller part first, each way once."""
  ways = {}
  for size in range(1, len(numbers) // 2 + 1):
    for chosen in itertools.combinations(range(len(numbers)), size):
      few = tuple(numbers[i] for i in chosen)
      many = tuple(number for i, number in enumerate(numbers) if i not in chosen)
      ways[few, many] = None
  return list(ways)
