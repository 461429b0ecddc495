import json
import pathlib
import random
import time

import pytest

from benchmarks.grading import HOSTILE
from spo_jax import rewards
from spo_jax.rewards import maths
from spo_jax.rewards.boxed import SEARCHED, boxed

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
DATA = pathlib.Path(__file__).parents[2] / ".." / "shared" / "data"
TIMEOUT_S = 2.0

# Where our verdict differs from the reference's, with ours and the reason.
BOXED_DEVIATIONS = {
  ("0.3333", r"\frac{1}{3}"): (False, "a rounded number is not the number"),
  ("[2,5)", "(2,5)"): (False, "one interval has its end, the other has not"),
}
PREFIX_DEVIATIONS = {
  ("2/4", "1/2"): (True, "equal as numbers, as the reference has it for boxed answers"),
  (r"\frac{2}{4}", r"\frac{1}{2}"): (True, "the same"),
  ("50%", "0.5"): (True, "equal as numbers, as the reference has it for boxed answers"),
  ("3 million", "3000000"): (True, "equal as numbers"),
  ("10^{10}", "10000000000"): (True, "equal as numbers; the reference evaluates no large power"),
  ("a+b+c", "c+b+a"): (True, "equal by commutation; the reference gives up at three letters"),
  ("2 or -2", "-2 or 2"): (True, "the order of solutions does not matter"),
  ("# Answer 42", "42"): (True, "the answer may stand in the heading's own line"),
}


def _load(name):
  return json.loads((FIXTURES / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def maths_pool():
  made = rewards.open_grader("math", workers=2, timeout_s=TIMEOUT_S)
  yield made
  rewards.close_grader(made)


def test_boxed_fixture_agrees_but_for_named_deviations():
  rows = _load("grading_math_boxed")
  assert len(rows) == 35
  differing = {}
  for row in rows:
    gold = maths.extract_answer(row["solution"])
    verdict = bool(maths.grade(row["text"], gold))
    if verdict != row["correct"]:
      differing[maths.extract_answer(row["text"]), gold] = verdict
  assert differing == {key: verdict for key, (verdict, _) in BOXED_DEVIATIONS.items()}


def test_prefix_fixture_agrees_but_for_named_deviations():
  rows = _load("grading_math_answer_prefix")
  assert len(rows) == 40
  differing = {}
  for row in rows:
    text, truth = row.get("given_answer", row.get("text")), row["ground_truth"]
    if row["kind"] == "text":
      verdict = bool(maths.grade(text, truth))
    else:
      verdict = text is not None and maths.answers_equal(text, truth)
    if verdict != row["correct"]:
      differing[text, truth] = verdict
  assert differing == {key: verdict for key, (verdict, _) in PREFIX_DEVIATIONS.items()}


@pytest.mark.parametrize(
  "response, expected",
  [
    (r"so \boxed{1} wait \boxed{2}", "2"),
    (r"$\boxed{2}$ and $\boxed{3}$.", "2, 3"),
    (r"\boxed{7}, \boxed{7}", "7"),
    (r"\boxed{1}, so \boxed{2}, \boxed{3} or $\boxed{4}$", "2, 3, 4"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{1} and \boxed{2", "1"),
    (r"\boxed{", None),
    ("boxed 5", None),
    ("\n# Answer\n\n 5 \n", "5"),
    ("# Answer\nx+1 = y", "x+1 = y"),
    ("# Answer\nIt is \\boxed{5}.", "5"),
    ("## Answer\n5\n# Answer\n5", None),
    ("# Answers are many. 7", "7"),
    ("The answer is 5. No: the answer is $x=6$\nbye", "$x=6$"),
    ("The final answer is $3$. I hope it is correct. 9", "$3$"),
    ("3 times 4 is 12, -12.", "-12."),
    ("none", None),
    ("", None),
  ],
)
def test_extract_answer(response, expected):
  assert maths.extract_answer(response) == expected


@pytest.mark.parametrize(
  "text, contents",
  [
    (r"\boxed{a}\fbox {b}", ["a", "b"]),
    (r"\boxed{a \boxed{b} c}", [r"a \boxed{b} c"]),
    (r"\boxed{a \boxed{b}", ["b"]),
    (r"\boxed{\{1\}}", [r"\{1\}"]),
    (r"\boxed{\left\{ 1}", [r"\left\{ 1"]),
    (r"}} \boxed{1} {", ["1"]),
    (r"\\boxed{1}", []),
    ("{" * 50 + r"\boxed{1}", ["1"]),
    ("boxed{1}", []),
    (r"\boxed{1}" + "x" * SEARCHED, []),
  ],
)
def test_boxed(text, contents):
  assert [box.content for box in boxed(text)] == contents


@pytest.mark.parametrize(
  "given, reference, equal",
  [
    # units, signs and looks
    (r"12\text{ cm}^2", "12", True),
    ("12 cm", "12", True),
    ("2 ab", "2", False),
    ("2t", "2", False),
    ("2x", "2", False),
    (r"11,\!880", "11880", True),
    (r"24{,}000", "24,000", True),
    ("2,3", "23", False),
    (r"\$18.90", "18.90", True),
    (r"50\%", "50", True),
    ("540", "5.4", False),
    # numbers
    (r"1\frac{4}{5}", "9/5", True),
    (r"\sqrt{2}/2", r"\frac1{\sqrt2}", True),
    ("-2", "2", False),
    (r"10\,000", "10000", True),
    (r"10\,000", "0", False),
    ("0.333333", r"\frac{1}{3}", False),
    (".0000668", ".0000672", False),
    ("1.414213562373", r"\sqrt{2}", True),
    ("2516_7", "2516_{7}", True),
    ("2516", "2516_7", True),
    ("2516_7", "2516_8", False),
    (r"2+3i", "3i+2", True),
    # expressions and equations
    (r"5\text{ or 6, 7}", "5", False),
    ("(x-1)(x+1)", "x^2-1", True),
    ("y=2x+3", "2x+3", True),
    ("2x+3", "y=2x+3", True),
    ("x", "y", False),
    # collections
    (r"\[ (2,1) \]", r"\((2,1)\)", True),
    (r"**\(5\)**.", "5", True),
    ("2**3", "23", False),
    ("2,1", "1,2", True),
    ("(2,1)", "(1,2)", False),
    ("(1,2]", "[1,2]", False),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)", True),
    (r"1\pm\sqrt{2}", r"1+\sqrt{2},1-\sqrt{2}", True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
    # words
    ("(B)", r"\text{(B)}", True),
    ("b", r"\text{B}", True),
    ("A, B", r"\text{A,B}", True),
    (r"\text{A}, \text{B}", r"\text{A}, \text{C}", False),
    (r"\text{A} \text{B}", r"\text{A} \text{C}", False),
    ("seat", r"\text{east}", False),
    ("East", "east", True),
    # what does not parse
    ("5 }{", "5", False),
    ("", "", False),
    ("1" * 1001, "1" * 1001, False),
  ],
)
def test_answers_equal(given, reference, equal):
  assert maths.answers_equal(given, reference) is equal


def test_hostile_latex_costs_its_own_reward_only(maths_pool):
  hostile = list(HOSTILE.values())
  good = r"\boxed{\frac12}"
  responses = [text for bad in hostile for text in (good, bad)]
  start = time.perf_counter()
  graded, failed = rewards.grade_all(responses, ["0.5"] * len(responses), maths_pool)
  elapsed = time.perf_counter() - start
  assert graded[::2].tolist() == [1.0] * len(hostile)
  assert graded[1::2].tolist() == [0.0] * len(hostile)
  assert 1 <= failed.sum() <= 4  # the others are bounded by the lengths that are searched or parsed
  assert elapsed < (len(hostile) / 2 + 1) * TIMEOUT_S + 3.0


def test_reference_answers_of_math_equal_themselves(maths_pool):
  path = DATA / "math" / "train.jsonl"
  if not path.exists():
    pytest.skip("the data set MATH is not beside the repository")
  answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
  answers = [a for a in random.Random(0).sample(answers, 100) if a]
  # Spaces make the texts differ, so that they are compared by what they mean.
  responses = [rf"So it is $\boxed{{{a} \;}}$." for a in answers]
  graded, failed = rewards.grade_all(responses, answers, maths_pool)
  assert graded.tolist() == [1.0] * len(answers) and not failed.any()


def test_votes_leave_out_what_is_there_for_looks():
  assert maths.vote(r"so \boxed{\dfrac{1}{2}}") == maths.vote(r"thus $\boxed{ \frac{1}{2} }$.")
  assert maths.vote("nothing") is None
  assert len(maths.vote("The answer is " + "x" * 5000)) <= 1000
