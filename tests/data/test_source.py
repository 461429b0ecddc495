import json
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from spo_jax.data import arithmetic, source, tokenizer
from spo_jax.data.prompts import Template
from spo_jax.errors import UserError

REPOSITORY = pathlib.Path(__file__).parents[2]
SIZES = {"train": 30, "validation": 6, "test": 5}


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
  monkeypatch.setattr(arithmetic, "SPLIT_SIZES", SIZES)
  return str(tmp_path)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
  return tokenizer.load_tokenizer("", work_dir=str(tmp_path_factory.mktemp("tokenizer")))


def records(size):
  return [{"question": f"q{i}", "solution": f"s{i}", "answer": f"{i}"} for i in range(size)]


def indices(batches):
  return [record["index"] for batch in batches for record in batch]


@pytest.mark.parametrize(
  "variant, fields",
  [
    ("plain", {"filler": False}),
    ("filler", {"filler": True}),
    ("long", {"filler": False, "difficulty": arithmetic.LONG}),
  ],
)
def test_load_split_holds_what_was_generated(data_dir, variant, fields):
  expected = arithmetic.make_splits(SIZES, **fields)
  for _ in range(2):  # Built, then read.
    for split, size in SIZES.items():
      loaded = source.load_split("arithmetic", variant, split, data_dir)
      assert len(loaded) == size
      for i, (record, example) in enumerate(zip(loaded, expected[split], strict=True)):
        assert record == {"id": i, **vars(example)}
  assert loaded[-1] == loaded[4] and loaded[1:3] == [loaded[1], loaded[2]]
  with pytest.raises(IndexError):
    loaded[5]


def test_part_of_a_split(data_dir):
  whole = source.load_split("arithmetic", "plain", "train", data_dir)
  part = source.load_split("arithmetic", "plain", "train[10:14]", data_dir)
  assert list(part) == whole[10:14]


@pytest.mark.parametrize(
  "name, variant, split, message",
  [
    ("gsm9k", "plain", "train", "unknown data set 'gsm9k', known are: arithmetic"),
    ("arithmetic", "noisy", "train", "no variant 'noisy', it has: filler, long, plain"),
    ("arithmetic", "plain", "dev", "no split 'dev', it has: train, validation, test"),
    ("arithmetic", "plain", "train[", "no split"),
    ("arithmetic", "plain", "train[:0]", "is empty"),
    ("arithmetic", "plain", "", "no split"),
  ],
)
def test_mistakes_get_one_line(data_dir, name, variant, split, message):
  with pytest.raises(UserError, match=message.replace("[", r"\[")) as error:
    source.load_split(name, variant, split, data_dir)
  assert "\n" not in str(error.value)


def test_split_without_records(tmp_path, monkeypatch):
  monkeypatch.setattr(arithmetic, "SPLIT_SIZES", {"train": 3, "validation": 0, "test": 2})
  with pytest.raises(UserError, match='cannot be built: .*"validation"'):
    source.load_split("arithmetic", "plain", "validation", str(tmp_path))


def test_process_killed_halfway_leaves_nothing_that_loads(data_dir, tmp_path):
  program = f"""
import os, signal
from spo_jax.data import arithmetic, source
arithmetic.SPLIT_SIZES = {SIZES}
generate = arithmetic.Arithmetic._generate_examples
def stop(self, examples):
  yield from generate(self, examples)
  if len(examples) == {SIZES["validation"]}:  # The second split; the first is on disk.
    os.kill(os.getpid(), signal.SIGKILL)
arithmetic.Arithmetic._generate_examples = stop
source.load_split("arithmetic", "plain", "train", {data_dir!r})
"""
  killed = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=REPOSITORY)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert list(tmp_path.glob("arithmetic/plain/incomplete*/*train*"))
  for split, size in SIZES.items():
    assert len(source.load_split("arithmetic", "plain", split, data_dir)) == size


def test_loser_of_a_race_reads_the_winners_data(data_dir, monkeypatch):
  make_splits = arithmetic.make_splits

  def lose_race(*args, **kwargs):
    monkeypatch.setattr(arithmetic, "make_splits", make_splits)
    source.load_split("arithmetic", "plain", "train", data_dir)  # Another process finishes first.
    return make_splits(*args, **kwargs)

  monkeypatch.setattr(arithmetic, "make_splits", lose_race)
  assert len(source.load_split("arithmetic", "plain", "train", data_dir)) == 30


def test_full_disk_is_told_and_leaves_nothing(tmp_path):
  # A limit on the size of a file stands in for the disk: what writes past it gets an error too.
  unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, unlimited[1]))
  try:
    with pytest.raises(UserError, match=r"'arithmetic/plain/.*' cannot be written to .*: File too"):
      source.load_split("arithmetic", "plain", "train", str(tmp_path))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
  assert len(source.load_split("arithmetic", "plain", "validation", str(tmp_path))) > 0


def test_a_fault_of_a_builder_is_no_full_disk(tmp_path, monkeypatch):
  def fail(self):
    raise RuntimeError("a fault")

  monkeypatch.setattr(arithmetic.Arithmetic, "download_and_prepare", fail)
  with pytest.raises(RuntimeError, match="^a fault$"):
    source.load_split("arithmetic", "plain", "train", str(tmp_path))


def test_damaged_data_set_is_named(data_dir, tmp_path):
  source.load_split("arithmetic", "plain", "train", data_dir)
  next(tmp_path.glob("arithmetic/plain/*/dataset_info.json")).unlink()
  with pytest.raises(UserError, match="delete it"):
    source.load_split("arithmetic", "plain", "train", data_dir)


def test_stream_is_a_new_permutation_each_epoch():
  batches = source.make_iterator(records(7), batch_size=3, seed=5)
  drawn = [next(batches) for _ in range(7)]
  assert all(len(batch) == 3 for batch in drawn)
  epochs = np.array(indices(drawn)).reshape(3, 7)
  assert (np.sort(epochs, axis=1) == np.arange(7)).all()
  assert len({tuple(epoch) for epoch in epochs}) == 3
  flat = [record for batch in drawn for record in batch]
  assert [record["ordinal"] for record in flat] == list(range(21))
  assert all(record["answer"] == str(record["index"]) for record in flat)


def test_a_stream_has_the_records_of_the_files(data_dir, embedded):
  whole = source.load_split("arithmetic", "plain", "train", data_dir)
  lengths = sorted(len(embedded(record["question"])["input_ids"]) for record in whole)
  kept = source.keep_short_prompts(whole, embedded, Template(), lengths[len(whole) // 2])
  assert len(kept) < len(whole)
  for split in (whole, kept):
    batch = next(source.make_iterator(split, batch_size=len(split), seed=3))
    assert indices([batch]) != list(range(len(split)))
    for ordinal, record in enumerate(batch):
      assert record == split[record["index"]] | {"index": record["index"], "ordinal": ordinal}


def test_stream_depends_on_seed_alone():
  def draw(seed, batch_size):
    batches = source.make_iterator(records(50), batch_size=batch_size, seed=seed)
    return indices(next(batches) for _ in range(60 // batch_size))

  assert draw(1, 5) == draw(1, 5) == draw(1, 12)
  assert draw(1, 5) != draw(2, 5)


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7, 8])  # Of batches; an epoch ends within the third.
def test_stream_resumes_exactly(done):
  uninterrupted = source.make_iterator(records(7), batch_size=3, seed=9)
  expected = [next(uninterrupted) for _ in range(20)]
  first = source.make_iterator(records(7), batch_size=3, seed=9)
  for _ in range(done):
    next(first)
  state = json.loads(json.dumps(first.get_state()))
  assert first.get_state() == state  # Looking at it changes nothing.
  next(first)
  resumed = source.make_iterator(records(7), batch_size=3, seed=9)
  next(resumed)
  resumed.set_state(state)
  assert resumed.get_state() == state
  assert [next(resumed) for _ in range(20 - done)] == expected[done:]
  first.set_state(state)
  assert next(first) == expected[done]


def test_state_of_another_stream_is_refused():
  state = source.make_iterator(records(7), batch_size=3, seed=9).get_state()
  for size, seed, message in [(8, 9, "size 7, this run has size 8"), (7, 1, "seed 9")]:
    other = source.make_iterator(records(size), batch_size=3, seed=seed)
    with pytest.raises(UserError, match=message):
      other.set_state(state)


def test_stream_with_replacement():
  def draw(batch_size, count, seed=5):
    batches = source.make_iterator(records(7), batch_size=batch_size, seed=seed, replacement=True)
    return [indices([next(batches)]) for _ in range(count)]

  batches = draw(3, 120)
  assert all(len(set(batch)) == 3 for batch in batches)  # No record twice within a batch.
  counts = np.bincount(np.ravel(batches), minlength=7)
  assert counts.min() > 30 and counts.max() < 73  # 51 expected, deviation 5.
  # Independent of the batch before: 3 of 7 records come again, with probability 3 / 7 each.
  again = [len({*a} & {*b}) / 3 for a, b in zip(batches[:-1], batches[1:], strict=True)]
  assert 0.35 < np.mean(again) < 0.51
  assert draw(3, 4) == batches[:4] and draw(3, 4, seed=6) != batches[:4]
  with pytest.raises(UserError, match="8 different prompts cannot be drawn from 7"):
    draw(8, 1)


def test_stream_with_replacement_resumes_exactly():
  make = lambda size, **how: source.make_iterator(records(7), batch_size=size, seed=9, **how)
  first = make(3, replacement=True)
  next(first)
  state = json.loads(json.dumps(first.get_state()))
  resumed = make(3, replacement=True)
  resumed.set_state(state)
  assert next(resumed) == next(first)
  for other in (make(3), make(4, replacement=True)):
    with pytest.raises(UserError, match="the saved prompt stream has"):
      other.set_state(state)
  with pytest.raises(UserError, match="replacement False, this run has replacement True"):
    resumed.set_state(make(3).get_state())


def test_stream_arguments():
  with pytest.raises(UserError, match="empty"):
    source.make_iterator([], batch_size=1, seed=0)
  with pytest.raises(ValueError, match="batch_size"):
    source.make_iterator(records(2), batch_size=0, seed=0)


def test_encode_prompts(embedded):
  questions = ["ann has 19 pens . doubles how many ?", "2 pens"]
  tokens, lengths = source.encode_prompts(embedded, questions, 12)
  assert tokens.shape == (2, 12) and tokens.dtype == lengths.dtype == np.int32
  assert lengths.tolist() == [10, 2]
  for row, length, question in zip(tokens, lengths, questions, strict=True):
    assert embedded.decode(row[:length]) == question
    assert (row[length:] == embedded.pad_token_id).all()
  exact, _ = source.encode_prompts(embedded, questions, 10)
  np.testing.assert_array_equal(exact, tokens[:, :10])
  with pytest.raises(UserError, match="10 tokens, at most 9"):
    source.encode_prompts(embedded, questions, 9)
  with pytest.raises(UserError, match="position 1 is empty"):
    source.encode_prompts(embedded, ["2 pens", ""], 9)
  empty, no_lengths = source.encode_prompts(embedded, [], 9)
  assert empty.shape == (0, 9) and no_lengths.shape == (0,)


def test_encode_solutions(embedded):
  solutions = ["2*4=8;#8", "2*4=8;so 8+1=9;#9"]
  encoded = source.encode_solutions(embedded, solutions)
  for ids, solution in zip(encoded, solutions, strict=True):
    assert ids.dtype == np.int32 and ids[-1] == embedded.eos_token_id
    assert embedded.decode(ids[:-1]) == solution
  assert source.encode_solutions(embedded, []) == []
