r"""Grades the Game of 24: a boxed expression that makes 24 of four numbers, each used once."""

import ast
import fractions
import operator
import re
from collections.abc import Sequence

from spo_jax.rewards.boxed import boxed

TARGET = 24
MAX_EXPRESSION_LENGTH = 200  # characters; Python's parser and our recursion are safe with these

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_OPERATORS |= {ast.Div: operator.truediv}  # of fractions, so exact
_SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_RESULT = re.compile(rf"=\s*{TARGET}\s*\.?\s*$")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_TIMES = re.compile(r"\\times|\\cdot|×|·")
_DIVIDED = re.compile(r"\\div|÷")
_PLAIN = re.compile(r"[0-9+\-*/() ]*")


def grade(response: str, answer: str) -> float:
  r"""1.0 if the response's only `\boxed{...}` solves the puzzle, else 0.0.

  Args:
    response: What the model wrote, without its prompt.
    answer: The puzzle's numbers, as `4 6 1 1` or `[4, 6, 1, 1]`.
  """
  boxes = boxed(response)
  numbers = [int(number) for number in re.findall("[0-9]+", answer)]
  return float(len(boxes) == 1 and solves(boxes[0].content, numbers))


def solves(expression: str, numbers: Sequence[int]) -> bool:
  r"""Whether an expression in `+ - * / ( )` uses exactly these numbers and equals 24.

  LaTeX's `\times`, `\cdot`, `\div` and `\frac` are read too; `= 24` may stand at the end. Powers,
  floor division and products without a sign are not part of the game.
  """
  if len(expression) > MAX_EXPRESSION_LENGTH:
    return False
  plain = _plain(expression)
  if plain is None:
    return False
  try:
    tree = ast.parse(plain, mode="eval").body
    used: list[int] = []
    return _value(tree, used) == TARGET and sorted(used) == sorted(numbers)
  except (SyntaxError, ValueError, ZeroDivisionError):
    return False


def _plain(expression: str) -> str | None:
  """The expression in Python's signs; None if something else is left."""
  text = _RESULT.sub("", expression)
  text = text.replace(r"\left", "").replace(r"\right", "")
  text = _DIVIDED.sub("/", _TIMES.sub("*", text))
  found = 1
  while found:  # from the inside out
    text, found = _FRACTION.subn(r"((\1)/(\2))", text)
  text = " ".join(text.split())
  return text if _PLAIN.fullmatch(text) else None


def _value(node: ast.expr, used: list[int]) -> fractions.Fraction:
  """The value of a tree; its numbers go to `used`. ValueError if it is more than arithmetic."""
  match node:
    case ast.Constant(value=int(number)):
      used.append(number)
      return fractions.Fraction(number)
    case ast.BinOp(op=op) if type(op) in _OPERATORS:
      return _OPERATORS[type(op)](_value(node.left, used), _value(node.right, used))
    case ast.UnaryOp(op=op) if type(op) in _SIGNS:
      return _SIGNS[type(op)](_value(node.operand, used))
  raise ValueError(f"{type(node).__name__} is not arithmetic")
