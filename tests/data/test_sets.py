import ast
import json
import pathlib
import shutil

import numpy as np
import pytest

from spo_jax.data import game24, sets, source
from spo_jax.errors import UserError
from spo_jax.rewards import numbers

REPOSITORY = pathlib.Path(__file__).parents[2]
SAMPLES = pathlib.Path(__file__).parent / "samples"
FULL = REPOSITORY.parent / "shared" / "data"
TEXTS = ("question", "answer", "solution", "subject", "level", "key")


def load(name, split, data_dir, manual_dir=SAMPLES, **fields):
  return source.load_split(
    name, "plain", split, str(data_dir), manual_dir=str(manual_dir), fields=sets.Fields(**fields)
  )


def rows(file):
  return [json.loads(line) for line in (SAMPLES / file).read_text("utf-8").splitlines()]


def by_question(records):
  return {record["question"]: record for record in records}


def write(path, *lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    "\n".join(json.dumps(x, ensure_ascii=False) if isinstance(x, dict) else x for x in lines),
    "utf-8",
  )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Sets that are not changed are built once for all tests."""
  return tmp_path_factory.mktemp("sets")


def test_gsm8k(data_dir):
  train, held = load("gsm8k", "train", data_dir), load("gsm8k", "validation", data_dir)
  assert (len(train), len(held), len(load("gsm8k", "test", data_dir))) == (7, 1, 5)
  found = by_question([*train, *held])
  for row in rows("gsm8k/train.jsonl"):
    record = found.pop(row["question"])
    worked, answer = row["answer"].split("\n#### ")
    assert record["answer"] == answer
    assert record["solution"].endswith(f"\n#### {answer}")
    assert "<<" not in record["solution"] and ">>" not in record["solution"]
    if "48/2 = <<48/2=24>>24" in worked:
      assert "sold 48/2 = 24 clips in May.\n" in record["solution"]
  assert not found
  assert "1,080" in {record["answer"] for record in [*train, *held]}


def test_records_have_all_texts_and_their_position(data_dir):
  for name in ("gsm8k", "math500", "aime24"):
    records = load(name, "test", data_dir)
    assert [record["id"] for record in records] == list(range(len(records)))
    assert all(set(record) == {"id", *TEXTS} for record in records)
    assert all(isinstance(record[text], str) for record in records for text in TEXTS)


def test_math_trains_on_its_train_split_and_is_tested_on_math500(data_dir):
  found = by_question([*load("math", "train", data_dir), *load("math", "validation", data_dir)])
  expected = rows("math/train.jsonl")
  assert set(found) == {row["problem"] for row in expected}
  for row in expected:
    record = found[row["problem"]]
    assert record["level"] == {"Level ?": ""}.get(row["level"], row["level"][-1])
    assert (record["subject"], record["key"]) == (row["subject"], row["unique_id"])
    assert (record["answer"], record["solution"]) == (row["answer"], "")
  assert sum(record["level"] == "" for record in found.values()) == 2
  assert list(load("math", "test", data_dir)) == list(load("math500", "test", data_dir))


def test_math500_and_aime24(data_dir):
  for name in ("math500", "aime24"):
    found = by_question(load(name, "test", data_dir))
    expected = rows(f"{name}/test.jsonl")
    assert len(found) == len(expected)
    for row in expected:
      record = found[row["problem"]]
      assert (record["answer"], record["solution"]) == (row["answer"], row["solution"])
      assert record["level"] == str(row.get("level", ""))
      assert record["key"] == str(row.get("unique_id", row.get("id")))
    with pytest.raises(UserError, match=f"'{name}' has no split 'train', it has: test"):
      load(name, "train", data_dir)


def test_order_is_that_of_the_questions_whatever_the_files_order(data_dir, tmp_path):
  shuffled = rows("gsm8k/train.jsonl")[::-1]
  write(tmp_path / "gsm8k/train.jsonl", *shuffled)
  shutil.copy(SAMPLES / "gsm8k/test.jsonl", tmp_path / "gsm8k")
  for split in ("train", "validation"):
    assert list(load("gsm8k", split, tmp_path / "d", tmp_path)) == list(
      load("gsm8k", split, data_dir)
    )


def test_rows_of_math_without_an_answer_are_left_out(tmp_path):
  row = {"problem": "q", "answer": ""}
  write(tmp_path / "math500/test.jsonl", row, row | {"answer": "1"})
  assert [r["answer"] for r in load("math500", "test", tmp_path, tmp_path)] == ["1"]


def problems(count, copies=1):
  return [sets.Problem(f"q{i % (count // copies)}", str(i)) for i in range(count)]


def test_validation_is_a_share_of_train_without_its_questions():
  splits = sets.with_validation({"train": problems(1000)})
  assert (len(splits["train"]), len(splits["validation"])) == (950, 50)
  assert len({p.question for split in splits.values() for p in split}) == 1000
  # Questions that come twenty times each: 5 % of 240 is inside a group of them.
  repeated = sets.with_validation({"train": problems(240, copies=24)})
  questions = [{p.question for p in repeated.get(name, [])} for name in ("train", "validation")]
  assert not questions[0] & questions[1]
  assert (len(questions[0]), len(questions[1])) == (9, 1)
  assert [p.question for p in sets.with_validation({"train": problems(1)})["train"]] == ["q0"]
  for count in (1, 3):
    assert "validation" not in sets.with_validation({"train": problems(count, copies=count)})
  own = sets.with_validation({"train": problems(100), "validation": problems(3)})
  assert (len(own["train"]), len(own["validation"])) == (100, 3)


def test_game24(data_dir):
  splits = {name: load("game24", name, data_dir, "") for name in ("train", "validation", "test")}
  assert {name: len(split) for name, split in splits.items()} == {
    "train": 1165,
    "validation": 61,
    "test": 136,
  }
  found = by_question(record for split in splits.values() for record in split)
  assert len(found) == 1362  # of the 1820 sets, as is known
  assert splits["train"][0]["answer"] == splits["train"][0]["question"]
  for question, record in found.items():
    expression = record["solution"].removeprefix(r"\boxed{").removesuffix("}")
    used = [
      node.value for node in ast.walk(ast.parse(expression)) if isinstance(node, ast.Constant)
    ]
    assert sorted(used) == json.loads(question)
    assert eval(expression) == pytest.approx(24, abs=1e-9)


@pytest.mark.parametrize(
  "numbers, expression",
  [((3, 3, 8, 8), "8/(3-(8/3))"), ((1, 5, 5, 5), "5*(5-(1/5))"), ((1, 1, 1, 1), None)],
)
def test_solve(numbers, expression):
  assert game24.solve(numbers) == expression


def test_own_rows_with_own_field_names(tmp_path):
  write(
    tmp_path / "train.jsonl",
    {"ask": "one?", "label": 1, "solution": "1", "id": 7, "level": None},
    "",
    {"ask": "half?", "label": 0.5, "subject": "halves"},
    {"ask": "line\u2028break?", "label": "x"},
  )
  load_own = lambda split: load("json", split, tmp_path, tmp_path, question="ask", answer="label")
  found = by_question([*load_own("train"), *load_own("validation")])
  assert {q: r["answer"] for q, r in found.items()} == {
    "one?": "1",
    "half?": "0.5",
    "line\u2028break?": "x",
  }
  one = found["one?"]
  assert (one["solution"], one["key"], one["level"]) == ("1", "7", "")
  assert found["half?"]["subject"] == "halves"
  with pytest.raises(UserError, match="no split 'test', it has: "):
    load_own("test")


def test_an_edited_file_is_read_again(tmp_path):
  for answer in ("1", "2"):
    write(tmp_path / "test.jsonl", {"question": "q", "answer": answer})
    assert [r["answer"] for r in load("json", "test", tmp_path, tmp_path)] == [answer]
  write(tmp_path / "test.jsonl", {"question": "q", "answer": "2", "other": "3"})
  for field, answer in (("answer", "2"), ("other", "3")):
    (record,) = load("json", "test", tmp_path, tmp_path, answer=field)
    assert record["answer"] == answer


@pytest.mark.parametrize(
  "lines, message",
  [
    (['{"question": "q", "answer": "1"}', "{'question': 2}"], "test.jsonl:2 is no JSON: "),
    (["[1, 2]"], "test.jsonl:1 is no JSON object"),
    (["", '{"question": "q", "reply": "1"}'], "test.jsonl:2 has no field 'answer', it has: q.*ly"),
    (['{"question": " ", "answer": "1"}'], "test.jsonl:1 has nothing in field 'question'"),
    (['{"question": "q", "answer": null}'], "test.jsonl:1 has nothing in field 'answer'"),
    (['{"question": "q", "answer": [1]}'], "test.jsonl:1 holds list in field 'answer'"),
    (['{"question": "q", "answer": "\\ud800"}'], "test.jsonl:1 holds half of a surrogate pair"),
    (['{"question": "q", "answer": true}'], "test.jsonl:1 holds bool in field 'answer'"),
    (["", " "], "test.jsonl' has no rows"),
    (["[" * 100_000], "test.jsonl:1 is no JSON: "),
  ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, lines, message):
  write(tmp_path / "test.jsonl", *lines)
  with pytest.raises(UserError, match=message) as error:
    load("json", "test", tmp_path / "built", tmp_path)
  assert "\n" not in str(error.value)


def test_files_that_cannot_be_used_are_named(tmp_path):
  (tmp_path / "test.jsonl").write_bytes(b'{"question": "\xff"}')
  with pytest.raises(UserError, match="test.jsonl' cannot be read as text"):
    load("json", "test", tmp_path / "built", tmp_path)
  write(tmp_path / "gsm8k/train.jsonl", {"question": "q", "answer": "four"})
  with pytest.raises(UserError, match="'gsm8k' needs gsm8k/test.jsonl in "):
    load("gsm8k", "train", tmp_path / "built", tmp_path)
  shutil.copy(SAMPLES / "gsm8k/test.jsonl", tmp_path / "gsm8k")
  with pytest.raises(UserError, match="train.jsonl:1 has no answer after ####"):
    load("gsm8k", "train", tmp_path / "built", tmp_path)


@pytest.mark.parametrize(
  "name, manual_dir, message",
  [
    ("math", "", "'math' needs config.data.manual_dir, a folder with math/train.jsonl, math500"),
    ("math", "/nowhere", "manual_dir '/nowhere' is no folder"),
    ("json", str(SAMPLES), "'json' needs train.jsonl, validation.jsonl, test.jsonl in "),
    ("gsm9k", "", "unknown data set 'gsm9k', known are: arithmetic, countdown, gsm8k, math"),
  ],
)
def test_mistakes_get_one_line(tmp_path, name, manual_dir, message):
  with pytest.raises(UserError, match=message):
    load(name, "test", tmp_path, manual_dir)


def test_sets_of_files_have_no_variants(tmp_path):
  with pytest.raises(UserError, match="'game24' has no variant 'filler', it has: plain"):
    source.load_split("game24", "filler", "test", str(tmp_path))


@pytest.mark.skipif(not FULL.is_dir(), reason="the full data sets are not beside the repository")
def test_full_sets(tmp_path):
  sizes = {
    ("gsm8k", "train"): 7099,
    ("gsm8k", "validation"): 374,
    ("gsm8k", "test"): 1319,
    ("math", "train"): 7123,  # of 7500 rows, two without an answer
    ("math", "validation"): 375,
    ("math", "test"): 500,
    ("math500", "test"): 500,
    ("aime24", "test"): 30,
  }
  loaded = {key: list(load(*key, tmp_path, FULL)) for key in sizes}
  assert {key: len(records) for key, records in loaded.items()} == sizes
  for (name, split), records in loaded.items():
    for record in records:
      answer = record["answer"]
      assert name not in ("gsm8k", "aime24") or numbers.numbers_equal(answer, answer), answer
      assert name != "gsm8k" or numbers.grade(record["solution"], answer) == 1.0
      assert (name in ("gsm8k", "aime24")) == (record["subject"] == ""), (name, split)
  levels = np.unique([r["level"] for r in loaded["math", "train"]], return_counts=True)
  assert levels[0].tolist() in (["1", "2", "3", "4", "5"], ["", "1", "2", "3", "4", "5"])
  shares = [r["subject"] == "Algebra" for r in loaded["math", "train"][:500]]
  assert 0.15 < np.mean(shares) < 0.35  # 23 % of the whole, which the file has in one piece
