"""Data sets of problems: GSM8K, MATH, MATH500, AIME 2024, Game of 24, a user's own JSON lines.

Sets that consist of files are read below a folder that the user names. GSM8K without that folder is
what TFDS downloads; Game of 24 is generated. The records of a split stand in the order of a hash of
their questions: its first n are a fair sample (the files of MATH are sorted by subject), and the
order does not depend on where the rows came from.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import tensorflow_datasets as tfds

from spo_jax.data import game24
from spo_jax.data.builder import TextBuilder
from spo_jax.data.download import Gsm8kDownload
from spo_jax.data.json_lines import Row, read_rows
from spo_jax.errors import UserError

VALIDATION_SHARE = 0.05  # of train, where a set has no validation split of its own
GAME24_TEST_SHARE = 0.1

# GSM8K's notes for a calculator, as in `48/2 = <<48/2=24>>24`.
_CALCULATOR_NOTE = re.compile(r"<<.*?>>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question and its answer; what a set does not tell is ""."""

  question: str
  answer: str
  solution: str = ""  # worked, answer included: what a warm start teaches
  subject: str = ""
  level: str = ""
  key: str = ""  # the row's name in its set


@dataclasses.dataclass(frozen=True)
class Fields:
  """Names of the two fields that a user's own rows must have."""

  question: str = "question"
  answer: str = "answer"


USUAL_FIELDS = Fields()


@dataclasses.dataclass(frozen=True)
class FileSet:
  """A data set that lies in files."""

  files: Mapping[str, str]  # by split; paths below the user's folder
  parse: Callable[[Row, Fields], Problem | None]  # None leaves a row out
  all_needed: bool = True  # otherwise any of the files will do


def _parse_gsm8k(row: Row, fields: Fields) -> Problem:
  del fields
  worked = _CALCULATOR_NOTE.sub("", row.text("answer"))
  _, marker, answer = worked.rpartition("####")
  if not marker or not answer.strip():
    raise row.error("has no answer after #### in field 'answer'")
  return Problem(row.text("question"), answer.strip(), solution=worked.strip())


def _parse_math(row: Row, fields: Fields) -> Problem | None:
  """Rows of MATH, MATH500 and AIME.

  Two rows of MATH have the level `Level ?`. Two others have an empty answer, with which no response
  could be graded, and are left out.
  """
  del fields
  answer = row.text("answer", may_be_empty=True)
  if not answer.strip():
    return None
  level = row.optional("level").removeprefix("Level ")
  return Problem(
    row.text("problem"),
    answer,
    solution=row.optional("solution"),
    subject=row.optional("subject"),
    level=level if level.isdigit() else "",
    key=row.optional("unique_id") or row.optional("id"),
  )


def _parse_own(row: Row, fields: Fields) -> Problem:
  return Problem(
    row.text(fields.question),
    row.text(fields.answer),
    solution=row.optional("solution"),
    subject=row.optional("subject"),
    level=row.optional("level"),
    key=row.optional("id"),
  )


MATH500_FILE = "math500/test.jsonl"
FILE_SETS = {
  "gsm8k": FileSet({"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}, _parse_gsm8k),
  "math": FileSet({"train": "math/train.jsonl", "test": MATH500_FILE}, _parse_math),
  "math500": FileSet({"test": MATH500_FILE}, _parse_math),
  "aime24": FileSet({"test": "aime24/test.jsonl"}, _parse_math),
  "json": FileSet(
    {split: f"{split}.jsonl" for split in ("train", "validation", "test")},
    _parse_own,
    all_needed=False,
  ),
}
NAMES = (*FILE_SETS, "game24")


def find_files(name: str, manual_dir: str) -> dict[str, pathlib.Path]:
  """Files of a set by split.

  Raises:
    UserError: if the folder is not named or does not exist, or a file is missing.
  """
  wanted = FILE_SETS[name].files
  listed = ", ".join(wanted.values())
  if not manual_dir:
    raise UserError(f"data set '{name}' needs config.data.manual_dir, a folder with {listed}")
  folder = pathlib.Path(manual_dir).expanduser()
  if not folder.is_dir():
    raise UserError(f"config.data.manual_dir '{manual_dir}' is no folder")
  found = {split: folder / file for split, file in wanted.items() if (folder / file).is_file()}
  missing = [file for split, file in wanted.items() if split not in found]
  if missing and (FILE_SETS[name].all_needed or not found):
    raise UserError(f"data set '{name}' needs {', '.join(missing)} in '{manual_dir}'")
  return found


def read_splits(
  name: str, files: Mapping[str, pathlib.Path], fields: Fields
) -> dict[str, list[Problem]]:
  """Problems of a set by split.

  Raises:
    UserError: with file and line, for a row that cannot be used.
  """
  splits = {}
  for split, path in files.items():
    parsed = [FILE_SETS[name].parse(row, fields) for row in read_rows(path)]
    splits[split] = [problem for problem in parsed if problem is not None]
  return with_validation(splits)


def with_validation(splits: Mapping[str, Sequence[Problem]]) -> dict[str, list[Problem]]:
  """Orders the splits by hash; takes a validation split from train where there is none."""
  splits = {name: _by_hash(problems) for name, problems in splits.items()}
  if "train" in splits and "validation" not in splits:
    held, splits["train"] = _hold_out(splits["train"], VALIDATION_SHARE)
    if held:
      splits["validation"] = held
  return splits


def game24_splits() -> dict[str, list[Problem]]:
  """Game of 24; question and answer are both the numbers, `[1, 1, 4, 6]`."""
  found = [
    Problem(
      str(list(numbers)),
      str(list(numbers)),
      solution=rf"\boxed{{{expression}}}",
      key="-".join(map(str, numbers)),
    )
    for numbers, expression in game24.solvable().items()
  ]
  test, rest = _hold_out(_by_hash(found), GAME24_TEST_SHARE)
  return with_validation({"train": rest, "test": test})


def _digest(text: str) -> bytes:
  return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _by_hash(problems: Sequence[Problem]) -> list[Problem]:
  return sorted(problems, key=lambda problem: _digest(problem.question))


def _hold_out(problems: list[Problem], share: float) -> tuple[list[Problem], list[Problem]]:
  """(the first `share` of the problems, the others); a question is never on both sides.

  At least one question is held out, and at least one is not; a single question is not held out.
  """
  count = max(1, round(len(problems) * share))
  cuts = [
    i for i in range(1, len(problems)) if problems[i - 1].question != problems[i].question
  ] or [0]
  count = max([cut for cut in cuts if cut <= count], default=cuts[0])
  return problems[:count], problems[count:]


class Problems(TextBuilder):
  """Splits of problems."""

  VERSION = tfds.core.Version("1.0.0")
  RECORD = Problem
  DESCRIPTION = "Problems with answers that can be checked."

  def __init__(self, load: Callable[[], dict[str, list[Problem]]], **kwargs):
    """`load` gives the splits, and is called only when they are not on disk yet."""
    self._load = load
    super().__init__(**kwargs)

  def _make_splits(self):
    return self._load()


def make_builder(name: str, data_dir: str, manual_dir: str, fields: Fields) -> Problems:
  """The builder of a set; nothing is built yet.

  What it writes lies in a folder of its own for every content of the files, so that edited files
  are read again.

  Raises:
    UserError: if files are needed that are not there.
  """
  if name == "game24":
    origin, load = "generated", game24_splits
  elif name == "gsm8k" and not manual_dir:
    origin, load = "tfds", lambda: _gsm8k_of_tfds(data_dir)
  else:
    files = find_files(name, manual_dir)
    digest = hashlib.sha256(repr((sorted(files), fields)).encode())
    for split in sorted(files):
      digest.update(hashlib.sha256(files[split].read_bytes()).digest())
    origin, load = digest.hexdigest()[:12], lambda: read_splits(name, files, fields)
  folder = pathlib.Path(data_dir) / f"{name}-{origin}"
  return Problems(load, data_dir=folder, file_format="array_record")


def _gsm8k_of_tfds(data_dir: str) -> dict[str, list[Problem]]:
  """GSM8K as TFDS's own builder downloads it."""
  builder = Gsm8kDownload(data_dir=data_dir, file_format="array_record")
  try:
    builder.download_and_prepare()
  except Exception as error:  # Whatever a network can do, through several libraries.
    reason = " ".join(str(error).split())[:160]
    raise UserError(
      f"GSM8K could not be downloaded ({reason}): set config.data.manual_dir to a folder with "
      + ", ".join(FILE_SETS["gsm8k"].files.values())
    ) from error
  splits = {}
  for split in FILE_SETS["gsm8k"].files:
    rows = [
      Row({k: v.decode() for k, v in record.items()}, f"gsm8k of TFDS, {split} {i}")
      for i, record in enumerate(builder.as_data_source(split))
    ]
    splits[split] = [_parse_gsm8k(row, USUAL_FIELDS) for row in rows]
  return with_validation(splits)
