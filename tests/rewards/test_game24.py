import json
import pathlib
import time

import pytest

from spo_jax.rewards import game24

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "grading_point24.json"

# Where our verdict differs from the reference's, with ours and the reason.
DEVIATIONS = {
  r"The expression is \boxed{4*6*1*1 = 24.}": (True, "a full stop ends the sentence"),
  r"The expression is \boxed{4 \cdot 6 \cdot 1 \cdot 1}": (True, "a sign of multiplication"),
  r"The expression is \boxed{4 × 6 × 1 × 1}": (True, "a sign of multiplication"),
  r"The expression is \boxed{\frac{8}{3-8/3}}": (True, "braces inside the box are balanced"),
  r"The expression is \boxed{2**3*3*1}": (False, "the game has no powers"),
  r"The expression is \boxed{7*7//2*1}": (False, "the game has no division with rounding"),
  "\\boxed{4*6\n*1*1}": (True, "a line break is a space"),
  r"\boxed {(1+2+3)*4}": (True, "a space before the brace means nothing to LaTeX"),
  "2e1+4*1": (False, "2e1 is 20, which is not given"),
}


def test_agrees_with_reference_but_for_named_deviations():
  rows = json.loads(FIXTURE.read_text())
  assert len(rows) == 36
  differing = {}
  for row in rows:
    puzzle = [int(number) for number in row["puzzle"]]
    if row["kind"] == "text":
      text, verdict = row["text"], bool(game24.grade(row["text"], str(puzzle)))
    else:
      text = row["given_answer"]
      verdict = text is not None and game24.solves(text, puzzle)
    if verdict != row["correct"]:
      differing[text] = verdict
  assert differing == {text: verdict for text, (verdict, _) in DEVIATIONS.items()}


@pytest.mark.parametrize(
  "expression, numbers, solved",
  [
    ("(1+2+3)*4", [4, 3, 2, 1], True),
    ("8/(3-8/3)", [3, 8, 3, 8], True),  # only exact fractions make 24 here
    ("5*(5-1/5)", [1, 5, 5, 5], True),
    (r"\frac{8}{3-\frac{8}{3}}", [3, 3, 8, 8], True),
    (r"\left(1+2+3\right) \div 1 \times 4", [1, 1, 2, 3, 4], True),
    ("+4*6", [4, 6], True),
    ("+".join("1" * 24), [1] * 24, True),
    ("*".join("1" * 100) + "*24", [1] * 100 + [24], False),  # too long
    ("4*6", [4, 6, 1], False),
    ("4*6*1*1", [4, 6, 1], False),
    ("4*6+0", [4, 6], False),
    ("12+12", [12], False),
    ("4*5", [4, 5], False),
    ("23.9999999999+0", [0], False),
    ("4*6=24=24", [4, 6], False),
    ("4*6=25", [4, 6], False),
    ("(4)(6)", [4, 6], False),
    ("4 6", [4, 6], False),
    ("046", [4, 6], False),
    ("24/(1-1)", [24, 1, 1], False),
    ("True*24", [24], False),
    ("__import__('os')", [], False),
    ("(lambda: 24)()", [24], False),
    ("24 if 1 else 1", [24, 1, 1], False),
    ("", [], False),
    (")", [], False),
  ],
)
def test_solves(expression, numbers, solved):
  assert game24.solves(expression, numbers) is solved


@pytest.mark.parametrize(
  "expression",
  [
    "9**9**9**9",
    "(" * 100 + "24" + ")" * 98,
    "-" * 198 + "24",
    "1" * 200,
    "9*" * 99 + "9",
    "1/" * 99 + "7",
    r"\frac{" * 33,
    "(" * 10**7,
    r"\boxed{" * 10**6,
    "24" + "\x00",
    "\ud800",
  ],
)
def test_odd_texts_are_quick_and_wrong(expression):
  start = time.perf_counter()
  assert game24.grade(expression, "1 2 3 4") == 0.0
  assert game24.grade(rf"\boxed{{{expression}}}", "1 2 3 4") == 0.0
  assert time.perf_counter() - start < 2.0
