"""Evaluation of a model: `python -m spo_jax.evaluate --config=configs/eval.py:math500
--config.model=DIR --workdir=runs/math500`.

Every response is kept in WORKDIR/responses.jsonl, a line a problem; `summary.json` and the table on
screen are made of it. The same command with the same workdir goes on where it was stopped.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from spo_jax import command_line, rewards
from spo_jax.config import EvaluationConfig
from spo_jax.config_check import from_config_dict
from spo_jax.config_rules import check_mesh
from spo_jax.errors import UserError
from spo_jax.evaluation import respond
from spo_jax.forest import Forest
from spo_jax.infra import hosts
from spo_jax.infra.compilation import keep_programs
from spo_jax.infra.mesh import make_mesh, row_shards
from spo_jax.infra.metrics import read_lines
from spo_jax.infra.progress import Progress, open_progress
from spo_jax.models.attention import check_backend
from spo_jax.models.families import config_from_hf
from spo_jax.models.pretrained import check_tensors, find_pretrained, load_params
from spo_jax.sampling.sampler import Sampler
from spo_jax.sampling.token import SamplingConfig
from spo_jax.scores import scores, table
from spo_jax.task import Task, grade_together, open_task

RESPONSES_FILE, SUMMARY_FILE = "responses.jsonl", "summary.json"

flags.mark_flag_as_required("workdir")


def evaluate_from_flags() -> None:
  """Checks the config, claims the workdir, samples what is missing, prints the table."""
  config = from_config_dict(command_line.CONFIG.value, EvaluationConfig)
  workdir = pathlib.Path(command_line.WORKDIR.value).absolute()
  command_line.connect_hosts()
  fields = dataclasses.asdict(config)
  claim = functools.partial(
    command_line.claim_workdir, results=(RESPONSES_FILE,), may_change=("compilation_cache",)
  )
  hosts.first_then_all(lambda: claim(workdir, fields))
  hosts.check_shared(workdir)
  keep_programs(config.compilation_cache)
  with open_progress(1, visible=hosts.is_first()) as progress:
    for line in table(evaluate_model(config, workdir, progress)):
      progress.note(line)


def evaluate_model(
  config: EvaluationConfig, workdir: pathlib.Path, progress: Progress
) -> dict[str, Any]:
  """Samples and grades what the workdir does not hold yet.

  Returns:
    The summary, as `summary.json` has it; see `scores.py`.

  Raises:
    UserError: if model, data or mesh do not fit each other, or the workdir holds responses to
      other problems.
  """
  mesh = make_mesh(**dataclasses.asdict(config.mesh))
  check_mesh(config, row_shards(mesh))
  pretrained = find_pretrained(config.model)
  compute, device = config.compute, mesh.devices.flat[0]
  model = config_from_hf(pretrained.hf, **dataclasses.asdict(compute)).on(mesh)
  check_tensors(pretrained, model)
  check_backend(
    compute.attention,
    device,
    dtype=compute.dtype,
    head_dim=model.head_dim,
    cap=model.attention_cap,
    group=model.heads // model.kv_heads,
  )
  task = open_task(
    config.data,
    max_prompt_tokens=config.max_prompt_tokens,
    workdir=workdir,
    model_folder=pretrained.folder,
    vocab_size=model.vocab_size,
    note=progress.note,
  )
  with contextlib.closing(task):
    records = task.held_out(config.split, config.problems)
    path = workdir / RESPONSES_FILE
    cut = lambda: read_whole_batches(path, config.batch, len(records))
    done = hosts.of_first(cut() if hosts.is_first() else 0)
    if done:
      _check_same_problems(path, records)
    if done < len(records):
      if done:
        progress.note(f"resumed after {done} of {len(records)} problems")
      sampler = Sampler(
        cfg=model,
        mesh=mesh,
        stop_ids=task.stop_ids,
        sampling=SamplingConfig(config.temperature, config.top_k, config.top_p),
        slots=config.slots,
        refill_share=config.refill_share,
        suffix_chunks=config.suffix_chunks,
        prefill_chunk=config.prefill_chunk,
      )
      params = load_params(pretrained, model, mesh)
      kept = path if hosts.is_first() else pathlib.Path(os.devnull)
      with progress.bar("problems", total=len(records)) as advance, kept.open("a") as file:
        advance(done)
        for lines in _answer(config, task, sampler, params, records[done:]):
          file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
          file.flush()
          if hosts.is_first():
            os.fsync(file.fileno())
          advance(len(lines))
  hosts.meet("all problems are answered")
  lines = read_lines(path)
  summary = {"model": config.model, "data": config.data.name, "split": config.split}
  summary |= scores(lines, config.contexts)
  if hosts.is_first():
    (workdir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
  return summary


def read_whole_batches(path: pathlib.Path, batch: int, problems: int) -> int:
  """How many problems a file of responses holds; it is cut behind its last whole batch.

  Batches are repeated whole, so that a resumed evaluation computes in the shapes, and so to the
  last bit the numbers, of one that ran through.
  """
  if not path.exists():
    return 0
  kept = path.read_bytes().split(b"\n")[:-1]  # behind the last line end stands nothing, or a torso
  whole = len(kept) if len(kept) >= problems else len(kept) // batch * batch
  unfinished = path.with_suffix(".tmp")
  unfinished.write_bytes(b"".join(line + b"\n" for line in kept[:whole]))
  os.replace(unfinished, path)
  return whole


def _check_same_problems(path: pathlib.Path, records: Sequence[dict[str, Any]]) -> None:
  lines = read_lines(path)
  same = len(lines) <= len(records) and all(
    (line["question"], line["answer"]) == (record["question"], record["answer"])
    for line, record in zip(lines, records, strict=False)
  )
  if not same:
    raise UserError(
      f"'{path}' answers other problems than config.data holds now: give another --workdir, or "
      "bring the data back"
    )


def _answer(
  config: EvaluationConfig,
  task: Task,
  sampler: Sampler,
  params: Any,
  records: Sequence[dict[str, Any]],
) -> Iterator[list[dict[str, Any]]]:
  """Lines of `responses.jsonl`, a batch at a time."""
  read_vote = rewards.find_vote(config.data.grader)
  batches = respond(
    task,
    sampler,
    params,
    records,
    jax.random.key(config.seed),
    samples=config.samples,
    max_new_tokens=max(config.contexts) - 1,
    batch=config.batch,
  )
  for chunk, forest, leaves in batches:
    lines = [_line(*pair, forest) for pair in zip(chunk, leaves, strict=True)]
    of_line = [line for line in lines for _ in line["responses"]]
    responses = [response for line in lines for response in line["responses"]]
    tokens = [forest.response(leaf) for leaf in leaves.reshape(-1)]
    for context in sorted(config.contexts):
      room = [context - line["prompt_tokens"] for line in of_line]
      texts = task.texts([ids[:most] for ids, most in zip(tokens, room, strict=True)])
      graded, failed = grade_together(task, texts, [line["answer"] for line in of_line])
      for i, response in enumerate(responses):
        response["text"] = texts[i]  # the largest context comes last
        response["at"][str(context)] = {
          "reward": float(graded[i]),
          "vote": read_vote(texts[i]) if read_vote else None,
          "truncated": not response["finished"] or response["tokens"] > room[i],
          "grader_failed": bool(failed[i]),
        }
    yield lines


def _line(record: dict[str, Any], leaves: np.ndarray, forest: Forest) -> dict[str, Any]:
  """A problem and its responses, not graded yet."""
  line = {name: record.get(name, "") for name in ("id", "key", "subject", "level")}
  line |= {"question": record["question"], "answer": record["answer"]}
  line["prompt_tokens"] = int(forest.lengths[forest.tree[leaves[0]]])
  line["responses"] = [
    {"tokens": len(forest.response(leaf)), "finished": bool(forest.finished[leaf]), "at": {}}
    for leaf in leaves
  ]
  line["id"] = int(line["id"])
  return line


if __name__ == "__main__":
  sys.exit(command_line.run_command(sys.argv, EvaluationConfig, evaluate_from_flags))
