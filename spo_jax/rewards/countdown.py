"""Grades countdown: equations that make the target of three numbers, each used once."""

import re
from collections import Counter

MAX_RESPONSE_LENGTH = 1000  # characters; what is longer is no response to this task
RETRY = "wait "  # begins another try

# Digits are ASCII alone: Python's \d and int() would take those of other scripts as well.
_NUMBER = "(0|[1-9][0-9]{0,3})"
_EQUATION = re.compile(rf"{_NUMBER}([-+*]){_NUMBER}={_NUMBER}")


def grade(response: str, answer: str) -> float:
  """1.0 if the response's last try makes the target and all its equations are right, else 0.0.

  Tries are parted by `;wait `, the equations of a try by `;`. A try takes operands from the given
  numbers and the results before it in the same try, each once. The last try uses up all numbers
  and leaves the target; those before may stop anywhere.

  Args:
    response: What the model wrote, without its prompt.
    answer: Numbers and target, as `3;5;7=22`.
  """
  given, _, target = answer.partition("=")
  numbers = Counter(map(int, given.split(";")))
  if len(response) > MAX_RESPONSE_LENGTH:
    return 0.0
  left = [_left(text, numbers) for text in response.split(f";{RETRY}")]
  return float(None not in left and left[-1] == Counter([int(target)]))


def _left(text: str, numbers: Counter[int]) -> Counter[int] | None:
  """What a try leaves of the numbers, its results included; None if one of its steps is wrong."""
  left = numbers.copy()
  for equation in text.split(";"):
    match = _EQUATION.fullmatch(equation)
    if match is None:
      return None
    a, sign, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
    left.subtract((a, b))
    if min(left[a], left[b]) < 0 or {"+": a + b, "-": a - b, "*": a * b}[sign] != result:
      return None
    left[result] += 1
  return left
