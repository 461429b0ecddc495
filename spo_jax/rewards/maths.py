r"""Grades LaTeX answers, as in MATH: the answer is found in the response here, and compared by the
package math-verify, which parses LaTeX into sympy.

Sympy may take for ever, or all memory, over a short text, so this grader runs in the pool only.
math-verify's own timeouts are off: they are signals, and Python acts on a signal between two
operations of its interpreter, which may be hours apart.
"""

import functools
import re
from collections.abc import Sequence

import math_verify
from latex2sympy2_extended import NormalizationConfig

from spo_jax.rewards import numbers
from spo_jax.rewards.boxed import SEARCHED, Box, boxed

MAX_ANSWER_LENGTH = 1000  # characters; the longest reference answer of MATH has 159
DECIMALS = 10  # that decimal fractions are compared by: 0.333333 is not 1/3

_HEADING = re.compile(r"# Answer\b")
_STATED = re.compile(r"(?:he|final) answer is:?")

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"\(?[A-Za-z]+\)?(?:[ ,]+\(?[A-Za-z]+\)?)*")
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;]|and|or)*")
_SIMPLE = re.compile(r"[^A-Za-z]*(?:\s(?:hundred|thousand|million|billion|trillion))?")
# A unit at the end: any words in \text, or one of these after a space.
_UNIT = re.compile(
  r"(?:(?<=[0-9})])\s*\\(?:text|textrm|textnormal|mathrm|mbox)\s*\{[^{}0-9]*\}"
  r"|(?<=[0-9}])\s+(?:[ckm]?m|[mk]?g|ml|ft|mph|inch|inches|foot|feet"
  r"|(?:met(?:er|re)|mile|yard|pound|degree|dollar|cent|second|minute|hour|day|week|month|year"
  r"|unit)s?))(?:\^\{?[23]\}?)?\.?$"
)
_BASE = re.compile(r"(?<=[0-9])_\{?([0-9]+)")  # math-verify drops it
# What LaTeX writes for looks alone, and how plain text would say the same.
_PLAIN = [
  (re.compile(pattern), plain)
  for pattern, plain in (
    (r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\!\s*|(?<!\\)(?:\$|\\[\[\]()])", ""),
    (r"\{,\}", ","),
    (r"(?<=[0-9])\.0+(?![0-9])", ""),
    (r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))", ""),
    (r"(?<!\\)\\[,;: ]|~|\s+", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°", ""),
  )
]

# All of the text is LaTeX: a number found within what does not parse is no answer. Units are
# dropped here, as math-verify would take the t of 2t for tons.
_EXTRACTION = [
  math_verify.LatexExtractionConfig(
    normalization_config=NormalizationConfig(
      basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
  )
]


def grade(response: str, answer: str) -> float:
  """1.0 if the response's answer equals the reference answer, else 0.0.

  Args:
    response: What the model wrote, without its prompt.
    answer: The reference answer in LaTeX, without a box or dollar signs around it.
  """
  extracted = extract_answer(response)
  return float(extracted is not None and answers_equal(extracted, answer))


def extract_answer(response: str) -> str | None:
  r"""The answer that a response gives; the first rule that applies decides.

  1. Under the only heading `# Answer`: what follows it, to which the next rule applies if it has a
     box. Two such headings state no answer.
  2. The last `\boxed{...}`, or several that only commas, `and` or `or` divide, as a list. A
     response that writes `boxed` and closes no box states no answer.
  3. The rest of the line after the last `The answer is` or `final answer is`.
  4. The last number.

  Returns:
    LaTeX, or None if there is no answer.
  """
  response = response[-SEARCHED:]
  headings = list(_HEADING.finditer(response))
  if len(headings) > 1:
    return None
  if headings:
    response = response[headings[0].end() :].strip()
  if "boxed" in response or r"\fbox" in response:
    return _last_boxes(response, boxed(response))
  if headings:
    return response
  *before, stated = _STATED.split(response)
  if before:
    return numbers.HOPE.split(stated.strip().partition("\n")[0])[0]
  return numbers.last_number(response)


def vote(response: str) -> str | None:
  """The answer for a majority vote, without what is there for looks.

  Answers that only sympy would call equal are different votes; those that the grader finds right
  are counted as one whatever they say (`algorithms/voting.py`).
  """
  answer = extract_answer(response)
  return None if answer is None else _plain(answer[:MAX_ANSWER_LENGTH])


def _last_boxes(response: str, boxes: Sequence[Box]) -> str | None:
  """The content of the last box, and of those that go on to it as a list, without repetitions."""
  contents: dict[str, None] = {}
  for box, following in zip(reversed(boxes), [None, *reversed(boxes)], strict=False):
    if following and not _BETWEEN_BOXES.fullmatch(response[box.stop : following.start]):
      break
    contents[box.content] = None
  return ", ".join(reversed(contents)) if contents else None


def answers_equal(given: str, reference: str) -> bool:
  """Whether two answers in LaTeX are the same, as texts, as numbers or to sympy.

  Units and degree signs are dropped. 50 % equals both 50 and 0.5. A number without its base equals
  one with it; of two bases both must be the same. Lists are unordered, tuples are
  ordered, and intervals of different brackets differ. Words differ as texts, but for their case.
  """
  if max(len(given), len(reference)) > MAX_ANSWER_LENGTH:
    return False
  given, reference = _plain(given), _plain(reference)
  if not given or not reference:
    return False
  if given == reference:
    return True
  if _SIMPLE.fullmatch(given) and _SIMPLE.fullmatch(reference):
    if numbers.numbers_equal(given, reference):
      return True
  words = [_words(given), _words(reference)]
  if None not in words and words[0] == words[1]:
    return True
  bases = [_BASE.findall(text) for text in (given, reference)]
  if all(bases) and bases[0] != bases[1]:
    return False
  return math_verify.verify(
    _parse(reference), _parse(given), float_rounding=DECIMALS, timeout_seconds=None
  )


def _plain(latex: str) -> str:
  """An answer without what is there for looks."""
  for pattern, plain in _PLAIN:
    latex = pattern.sub(plain, latex)
  latex = latex.strip(" *").removesuffix(".").strip(" *")  # Markdown's bold
  number = _UNIT.sub("", latex)
  return number if re.search("[0-9]", number) else latex


def _words(text: str) -> list[str] | None:
  r"""The words, in small letters, of an answer that has nothing else, in `\text` or not."""
  text = _TEXT.sub(r"\1", text).strip()
  return re.findall("[a-z]+", text.lower()) if _WORDS.fullmatch(text) else None


@functools.lru_cache(maxsize=1024)  # Samples of a prompt share its reference, and often answers.
def _parse(latex: str):
  return math_verify.parse(f"${latex}$", _EXTRACTION, parsing_timeout=None)
