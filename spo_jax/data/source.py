"""Where prompts come from: splits with random access, a resumable stream, token arrays."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from spo_jax.data import prompts, sets
from spo_jax.data.arithmetic import Arithmetic
from spo_jax.data.countdown import Countdown
from spo_jax.errors import UserError

EMBEDDED = {"arithmetic": Arithmetic, "countdown": Countdown}
DATASETS = (*EMBEDDED, *sets.NAMES)

_NOT_WRITTEN = "write() failed"  # what ArrayRecord's error says where a disk is full


def load_split(
  name: str,
  variant: str,
  split: str,
  data_dir: str,
  *,
  manual_dir: str = "",
  fields: sets.Fields = sets.USUAL_FIELDS,
) -> Sequence[dict[str, Any]]:
  """Opens a split of a data set, which is built on first use.

  Args:
    name: One of `DATASETS`.
    variant: Of an embedded task, the name of a builder config; the other sets have but `plain`.
    split: A split's name, or a part of it in the notation of TFDS such as `train[:100]`.
    data_dir: Folder in which data sets are kept.
    manual_dir: Folder of the files that a set is built from; see `sets.FILE_SETS`.
    fields: Of the set `json`, the fields that hold question and answer.

  Returns:
    Records with random access by position; texts are `str`. They have `id`, the position in the
    split, and `question`, `answer`, `solution`; all but the embedded tasks' also `subject`,
    `level` and `key`. What a set does not tell is "".

  Raises:
    UserError: If the name, the variant or the split is unknown, the split is empty, or the files
      cannot be used.
  """
  if name not in DATASETS:
    raise UserError(f"unknown data set '{name}', known are: {', '.join(DATASETS)}")
  embedded = EMBEDDED.get(name)
  variants = sorted(embedded.builder_configs) if embedded else ["plain"]
  if variant not in variants:
    raise UserError(f"data set '{name}' has no variant '{variant}', it has: {', '.join(variants)}")
  if embedded:
    open_builder = lambda: embedded(config=variant, data_dir=data_dir, file_format="array_record")
  else:
    open_builder = lambda: sets.make_builder(name, data_dir, manual_dir, fields)
  builder = _prepared_builder(open_builder)
  known = ", ".join(builder.info.splits)
  try:
    # TFDS does not read from a split without records: ask for the number first.
    size = builder.info.splits[split].num_examples
  except (KeyError, ValueError) as error:
    raise UserError(f"data set '{name}' has no split '{split}', it has: {known}") from error
  if size == 0:
    raise UserError(f"split '{split}' of data set '{name}/{variant}' is empty, it has: {known}")
  return _Records(builder.as_data_source(split=split), range(size))


class _Records(Sequence):
  """Chosen records of a source, with random access; texts are `str`."""

  def __init__(self, source, positions: Sequence[int]):
    self._source = source
    self._positions = positions

  def __len__(self):
    return len(self._positions)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.__getitems__(range(*index.indices(len(self))))
    return _with_text(self._source[self._positions[index]])

  def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    positions = [self._positions[index] for index in indices]
    return [_with_text(record) for record in _at(self._source, positions)]


def _with_text(record: dict[str, Any]) -> dict[str, Any]:
  return {k: v.decode() if isinstance(v, bytes) else v for k, v in record.items()}


def _at(source: Sequence[dict[str, Any]], positions: Sequence[int]) -> Sequence[dict[str, Any]]:
  """Records of a source, read together where it can do that, as many take half the time then."""
  if hasattr(source, "__getitems__"):
    return source.__getitems__(positions)
  return [source[position] for position in positions]


def _prepared_builder(open_builder):
  """A builder whose data are complete on disk.

  TFDS writes to a folder of random name and renames it when done. Who loses a race to the name
  reads what the winner wrote.

  Raises:
    UserError: If the data are not complete, cannot be made, or cannot be written.
  """
  builder = open_builder()
  if not builder.data_path.exists():
    logging.info("building %s in %s", builder.info.full_name, builder.data_path)
    tfds.disable_progress_bar()
    try:
      with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    except AssertionError as error:  # TFDS does not write a split without records.
      raise UserError(f"data set '{builder.info.full_name}' cannot be built: {error}") from error
    except OSError:
      builder = open_builder()
      if not builder.data_path.exists():
        raise
    except RuntimeError as error:
      if _NOT_WRITTEN not in str(error):
        raise
      name, path = builder.info.full_name, builder.data_path
      raise UserError(f"data set '{name}' cannot be written to '{path}': {error}") from error
  if not builder.is_prepared():
    raise UserError(f"'{builder.data_path}' is no complete data set: delete it to have it rebuilt")
  return builder


class PromptIterator:
  """An endless stream of batches that can be saved and resumed.

  Without replacement the split is shuffled anew in each epoch, and batches run on across the end of
  an epoch, so all have the same size. The order is a function of the seed and the split's size
  alone; batch size does not enter, and may change on resuming.

  With replacement every batch is drawn from the whole split, whatever came before; within a batch
  no record comes twice. (This is what AIFrameResearch/SPO calls sampling with replacement.)
  """

  def __init__(
    self,
    source: Sequence[dict[str, Any]],
    *,
    batch_size: int,
    seed: int,
    replacement: bool = False,
  ):
    if batch_size < 1:
      raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if len(source) < 1:
      raise UserError("the split to draw prompts from is empty")
    if replacement and batch_size > len(source):
      raise UserError(
        f"a batch of {batch_size} different prompts cannot be drawn from {len(source)}: take fewer "
        "a batch, or set config.data.replacement to False"
      )
    self._source = source
    self._batch_size = batch_size
    self._identity = {"size": len(source), "seed": int(seed), "replacement": replacement}
    if replacement:
      self._identity["batch size"] = batch_size
    self._ordinal = 0
    order = grain.MapDataset.source(range(len(source))).shuffle(seed=int(seed))
    # A batch with replacement is the beginning of an epoch that is left there.
    order = (order[:batch_size] if replacement else order).repeat()
    # A worker thread would buy nothing here, and would hold an end of the process.
    read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    self._positions = iter(order.to_iter_dataset(read_options))

  def __iter__(self):
    return self

  def __next__(self) -> list[dict[str, Any]]:
    """The next `batch_size` records.

    Each is the source's record with two numbers more: `index`, its position in the split, and
    `ordinal`, the count of draws before it (0, 1, 2, ... across epochs).
    """
    indices = [int(next(self._positions)) for _ in range(self._batch_size)]
    first, self._ordinal = self._ordinal, self._ordinal + self._batch_size
    return [
      dict(record) | {"index": index, "ordinal": ordinal}
      for ordinal, (index, record) in enumerate(
        zip(indices, _at(self._source, indices), strict=True), start=first
      )
    ]

  def get_state(self) -> dict[str, Any]:
    """The stream's position, a dictionary that JSON can hold."""
    return self._identity | {"ordinal": self._ordinal, "grain": self._positions.get_state()}

  def set_state(self, state: dict[str, Any]):
    """Goes to a position that `get_state` returned, here or in another process.

    Raises:
      UserError: If the state is that of another stream.
    """
    for key, value in self._identity.items():
      if state.get(key) != value:
        raise UserError(
          f"the saved prompt stream has {key} {state.get(key)}, this run has {key} {value}: "
          "resume with the same data and seed, or start a new run"
        )
    self._positions.set_state(state["grain"])
    self._ordinal = int(state["ordinal"])


def make_iterator(
  source: Sequence[dict[str, Any]], *, batch_size: int, seed: int, replacement: bool = False
) -> PromptIterator:
  """The stream of training prompts over a split; see `PromptIterator`."""
  return PromptIterator(source, batch_size=batch_size, seed=seed, replacement=replacement)


def keep_short_prompts(
  records: Sequence[dict[str, Any]], tokenizer, template: prompts.Template, max_length: int
) -> Sequence[dict[str, Any]]:
  """The records whose prompts have at most `max_length` tokens.

  Raises:
    UserError: If there are none.
  """
  questions = [record["question"] for record in records]
  lengths = [len(ids) for ids in prompts.token_ids(tokenizer, template, questions)]
  positions = [i for i, length in enumerate(lengths) if length <= max_length]
  if not positions:
    raise UserError(
      f"all {len(lengths)} prompts are longer than the {max_length} tokens of "
      f"config.rollout.max_prompt_tokens; the shortest has {min(lengths)}"
    )
  return records if len(positions) == len(lengths) else _Records(records, positions)


def encode_prompts(
  tokenizer,
  questions: Sequence[str],
  max_length: int,
  template: prompts.Template = prompts.PLAIN,
) -> tuple[np.ndarray, np.ndarray]:
  """Token ids of prompts.

  Args:
    tokenizer: A Hugging Face tokenizer.
    questions: R texts.
    max_length: Width P of the array.
    template: What stands around a question; see `prompts.token_ids`.

  Returns:
    Tokens `[R, P]` int32, padded on the right, and lengths `[R]` int32.

  Raises:
    UserError: If a prompt has no tokens or more than `max_length`.
  """
  ids = prompts.token_ids(tokenizer, template, questions)
  lengths = np.array([len(row) for row in ids], dtype=np.int32)
  if len(ids) and lengths.max() > max_length:
    longest = int(lengths.argmax())
    raise UserError(
      f"a prompt has {lengths[longest]} tokens, at most {max_length} are allowed: "
      f"'{questions[longest][:60]}...'"
    )
  if len(ids) and lengths.min() == 0:
    raise UserError(f"the prompt at position {int(lengths.argmin())} is empty")
  tokens = np.full((len(ids), max_length), tokenizer.pad_token_id, dtype=np.int32)
  for row, row_ids in zip(tokens, ids, strict=True):
    row[: len(row_ids)] = row_ids
  return tokens, lengths


def encode_solutions(
  tokenizer, solutions: Sequence[str], template: prompts.Template = prompts.PLAIN
) -> list[np.ndarray]:
  """Token ids of worked solutions, each an int32 array that ends with `prompts.end_id`.

  Raises:
    UserError: If a solution is empty.
  """
  if not len(solutions):
    return []
  if not all(solutions):
    raise UserError(
      "a record has no worked solution to start from: set config.warm_start.max_steps to 0, or "
      "give the data solutions"
    )
  end = prompts.end_id(tokenizer, template)
  ids = tokenizer(list(solutions), add_special_tokens=False)["input_ids"]
  return [np.array([*row, end], dtype=np.int32) for row in ids]
