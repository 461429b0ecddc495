r"""Finds what a response puts into `\boxed{...}`."""

import re
from typing import NamedTuple

# Characters of a response, from its end, that are searched: longer than a response of 32k tokens.
SEARCHED = 200_000

_TOKEN = re.compile(r"\\f?box(?:ed)?\s*\{|\\.|[{}]", re.DOTALL)


class Box(NamedTuple):
  """A box, and where it is in the part of the response that is searched."""

  content: str
  start: int
  stop: int


def boxed(response: str) -> list[Box]:
  r"""The outermost `\boxed{...}` and `\fbox{...}`, in order.

  Braces inside are balanced, and `\{` is not a brace; a box that never closes is none. One pass,
  so that no text takes long.
  """
  text = response[-SEARCHED:]
  open_braces: list[tuple[int, int] | None] = []  # a box: where it and where its content begins
  boxes: list[Box] = []
  for match in _TOKEN.finditer(text):
    token = match[0]
    if token == "}":
      box = open_braces.pop() if open_braces else None
      if box:
        while boxes and boxes[-1].start > box[0]:
          boxes.pop()
        boxes.append(Box(text[box[1] : match.start()].strip(), box[0], match.end()))
    elif token[-1] == "{" and token != r"\{":
      open_braces.append(None if token == "{" else match.span())
  return boxes
