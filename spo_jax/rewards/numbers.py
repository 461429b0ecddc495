"""Grades a final answer that is a number, as in GSM8K and in the embedded task."""

import fractions
import re

MAX_ANSWER_LENGTH = 100  # Characters after the marker; what is longer is no number.
LAST_NUMBER_SEARCHED = 10_000  # Characters from the end of a text without a marker.

HOPE = re.compile(r"\. I hope")  # What prompts ask to write behind an answer; it ends there.

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"  # Commas separate thousands: 2,3 is two numbers.
_POWER = r"(?:[eE][+-]?[0-9]{1,3})?"
_NUMBER = rf"{_WHOLE}(?:\.[0-9]*)?{_POWER}|\.[0-9]+{_POWER}"
_CURRENCY = r"(?:\\?[$]|[€£¥])?"
# Digits are ASCII alone: Python's \d and int() would take those of other scripts as well.
_ANSWER = re.compile(
  rf"{_CURRENCY}\s*(?P<sign>[-+−]?)\s*{_CURRENCY}\s*"
  rf"(?P<top>{_NUMBER})(?:\s*/\s*(?P<bottom>{_NUMBER}))?"
  # A unit of at most three words on the same line.
  rf"[ ]*(?:\\?[%$]|[€£¥°])?[ ]?(?P<unit>[^\W\d_]+(?:[ ][^\W\d_]+){{0,2}})?[ ]?\.?"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# A minus after a digit, a letter or a bracket is a subtraction.
_LAST_NUMBER = re.compile(
  rf"(?:(?<![\w)\]}}])[-−]{_CURRENCY})?(?:{_NUMBER})(?:/(?:{_NUMBER}))?", re.ASCII
)


def extract_answer(response: str) -> str | None:
  """The text after the response's only answer marker.

  The marker is a run of four or more `#` if there is any, else a run of any length, so that
  headings before GSM8K's `####` do no harm.

  Args:
    response: What the model wrote, without its prompt.

  Returns:
    The text after the marker without surrounding blanks, up to `. I hope it is correct` if that
    follows. None if it is empty, if there is no marker, or if there are two or more: a response
    that could list several answers and be graded on one of them would be rewarded for not deciding.
  """
  for marker in (r"#{4,}", r"#+"):
    matches = re.finditer(marker, response)
    match = next(matches, None)
    if match is None:
      continue
    if next(matches, None) is not None:
      return None
    return HOPE.split(response[match.end() :])[0].strip() or None
  return None


def numbers_equal(a: str, b: str) -> bool:
  """Whether two texts are the same number, exactly.

  Integers, decimals, fractions and powers of ten (`1e3`) are compared by value, so that 0.50
  equals 1/2. Commas between thousands are ignored; `3 million` is 3000000; a currency sign, a
  percent sign, a unit of up to three words and a full stop at the end are dropped without being
  compared. A text that holds anything else, two numbers for instance, equals nothing.
  """
  a, b = _parse(a), _parse(b)
  return a is not None and a == b


def grade(response: str, answer: str) -> float:
  """1.0 if the response's final answer equals the reference answer, else 0.0.

  Args:
    response: What the model wrote, without its prompt.
    answer: The reference answer, a number.
  """
  extracted = extract_answer(response)
  return float(extracted is not None and numbers_equal(extracted, answer))


def last_number(response: str) -> str | None:
  """The last number of a text, with its sign if it has one, or the last fraction `a/b`."""
  found = [match[0] for match in _LAST_NUMBER.finditer(response[-LAST_NUMBER_SEARCHED:])]
  return found[-1] if found else None


def grade_last_number(response: str, answer: str) -> float:
  """As `grade`, for models that were not taught a marker: the response's last number counts."""
  extracted = last_number(response)
  return float(extracted is not None and numbers_equal(extracted, answer))


def vote(response: str) -> str | None:
  """The final answer for a majority vote: equal numbers are equal texts."""
  return _normal_form(extract_answer(response))


def vote_last_number(response: str) -> str | None:
  """As `vote`, of the response's last number."""
  return _normal_form(last_number(response))


def _normal_form(answer: str | None) -> str | None:
  number = None if answer is None else _parse(answer)
  if number is None:
    return answer and answer[:MAX_ANSWER_LENGTH]
  return str(number)


def _parse(text: str) -> fractions.Fraction | None:
  """The number that a text is, if it is one."""
  text = text.strip()
  if len(text) > MAX_ANSWER_LENGTH:
    return None
  match = _ANSWER.fullmatch(text)
  if match is None:
    return None
  unit = match["unit"] or ""
  if unit and not unit.replace(" ", "").isalpha():  # 5½ and 5² are no 5
    return None
  value = _value(match["top"])
  if match["bottom"] is not None:
    bottom = _value(match["bottom"])
    if bottom == 0:
      return None
    value /= bottom
  scale = _SCALES.get(unit.partition(" ")[0].lower(), 0)
  value *= 10**scale
  return -value if match["sign"] in ("-", "−") else value


def _value(number: str) -> fractions.Fraction:
  mantissa, _, exponent = number.replace(",", "").lower().partition("e")
  whole, _, decimals = mantissa.partition(".")
  scale = int(exponent or "0") - len(decimals)
  return int(whole + decimals) * fractions.Fraction(10) ** scale
