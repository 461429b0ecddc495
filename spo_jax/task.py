"""What a policy is asked and how its answers are judged: data, tokenizer, template, grader.

Training and evaluation share it, and it knows no model.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from spo_jax import rewards
from spo_jax.config import EMBEDDED, DataConfig
from spo_jax.data import prompts as prompting
from spo_jax.data import source
from spo_jax.data.sets import Fields
from spo_jax.data.tokenizer import check_tokenizer, load_tokenizer
from spo_jax.infra import hosts
from spo_jax.sampling.strategies import Prompts


@dataclasses.dataclass(frozen=True)
class Task:
  """A data set as a policy meets it; made by `open_task`, closed by whoever made it."""

  data: DataConfig
  max_prompt_tokens: int
  data_dir: str  # folder that data sets are built in
  tokenizer: Any  # a Hugging Face tokenizer
  template: prompting.Template
  stop_ids: tuple[int, ...]  # tokens that end a response; it is trained to emit the first
  grader: rewards.Grader | rewards.GraderPool
  note: Callable[[str], None]  # tells the user a line
  _splits: dict[str, Sequence[dict[str, Any]]] = dataclasses.field(default_factory=dict)

  def split(self, name: str) -> Sequence[dict[str, Any]]:
    """Records of a split, without those whose prompts are too long; see `source.load_split`.

    The embedded tasks' prompts fit, and a prompt that does not is a mistake.
    """
    if name not in self._splits:
      self._splits[name] = self._load_split(name)
    return self._splits[name]

  def _load_split(self, name: str) -> Sequence[dict[str, Any]]:
    data = self.data
    records = source.load_split(
      data.name,
      data.variant,
      name,
      self.data_dir,
      manual_dir=data.manual_dir,
      fields=Fields(data.question_field, data.answer_field),
    )
    if data.name in EMBEDDED:
      return records
    limit = self.max_prompt_tokens
    kept = source.keep_short_prompts(records, self.tokenizer, self.template, limit)
    if dropped := len(records) - len(kept):
      self.note(
        f"{data.name} {name}: {dropped} of {len(records)} prompts have more than {limit} tokens "
        "and are left out"
      )
    return kept

  def held_out(self, split: str, count: int) -> list[dict[str, Any]]:
    """The first `count` records of a split, or all of them if there are fewer or `count` is 0."""
    records = self.split(split)
    return [records[i] for i in range(min(count or len(records), len(records)))]

  def prompts(self, records: Sequence[dict[str, Any]], key: jax.Array, ids: str) -> Prompts:
    """Tokenises records; a prompt's key is folded from its field `ids`, whatever the batch is."""
    tokens, lengths = source.encode_prompts(
      self.tokenizer, [r["question"] for r in records], self.max_prompt_tokens, self.template
    )
    numbers = np.asarray([int(r[ids]) for r in records], np.uint32)
    return Prompts(tokens, lengths, jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))

  def texts(self, responses: Sequence[np.ndarray]) -> list[str]:
    """Responses as texts, without special tokens."""
    return self.tokenizer.batch_decode(list(responses), skip_special_tokens=True)

  def grade(
    self, texts: Sequence[str], answers: Sequence[str], *, shaped: bool = False
  ) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of responses.

    Args:
      texts: R responses, without their prompts.
      answers: R reference answers.
      shaped: rewards to train on, with the config's penalty of format; else those that count.

    Returns:
      ([R] float32, [R] bool: the grader failed, and the reward is 0 for that).
    """
    graded, failed = rewards.grade_all(texts, answers, self.grader)
    if shaped:
      graded = rewards.shape(graded, texts, self.data.repeated_marker_reward)
    return graded, failed

  def close(self) -> None:
    """Ends the grader's processes."""
    rewards.close_grader(self.grader)


def grade_together(
  task: Task, texts: Sequence[str], answers: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
  """`task.grade` of all texts on every process, each of which grades its share."""
  own = hosts.share(len(texts))
  graded, failed = task.grade(texts[own], answers[own])
  return hosts.join_shares(graded, len(texts)), hosts.join_shares(failed, len(texts))


def open_task(
  data: DataConfig,
  *,
  max_prompt_tokens: int,
  workdir: pathlib.Path,
  model_folder: pathlib.Path | None,
  vocab_size: int | None,
  note: Callable[[str], None],
) -> Task:
  """Builds a task and checks its parts against each other. The caller closes it.

  Args:
    data: what to ask.
    max_prompt_tokens: longest prompt.
    workdir: where the data set and the embedded tokenizer are built.
    model_folder: of a Hugging Face model, whose tokenizer is taken unless the config names one.
    vocab_size: of the model; None fits any tokenizer.
    note: tells the user a line.

  Raises:
    UserError: if the tokenizer lacks a token or does not go with the model or the template, or
      the grader is unknown or cannot be loaded.
  """
  folder = data.tokenizer or str(model_folder or "")
  tokenizer = load_tokenizer(folder, work_dir=str(workdir))
  check_tokenizer(tokenizer, vocab_size or len(tokenizer))
  template = prompting.parse_template(data.template, data.system)
  template.render(tokenizer, "?")  # a chat template may be missing, or refuse a system turn
  stop_ids = prompting.stop_ids(tokenizer, template, folder)
  grader = rewards.open_grader(
    data.grader,
    workers=data.grader_workers,
    timeout_s=data.grader_timeout_s,
    memory_mb=data.grader_memory_mb,
  )
  data_dir = data.data_dir or str(workdir / "data")
  return Task(data, max_prompt_tokens, data_dir, tokenizer, template, stop_ids, grader, note)
