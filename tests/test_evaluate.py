"""The evaluation command: budgets, resuming, and a model that training exported."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from configs import eval as eval_config
from spo_jax.config import ComputeConfig, Config, EvaluationConfig, default_config
from spo_jax.config_check import from_config_dict
from spo_jax.errors import UserError
from spo_jax.evaluate import RESPONSES_FILE, SUMMARY_FILE, evaluate_model, read_whole_batches
from spo_jax.evaluation import accuracy
from spo_jax.infra.progress import Progress
from spo_jax.run import make_run
from tests import tiny_run

PROBLEMS, BATCH, SAMPLES, CONTEXTS = 10, 4, 2, (44, 60)


def tiny_config():
  """Of a training run with few weights."""
  config = default_config()
  for name, value in tiny_run.TINY.items():
    config.update_from_flattened_dict({name: value})
  config.warm_start.max_steps = 0
  return from_config_dict(config, Config)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """Folder of a random model, and the parameters that it was written from."""
  folder = tmp_path_factory.mktemp("exported")
  with Progress(1) as progress:
    run = make_run(tiny_config(), folder / "run", progress)
    params = run.initial_params()
    run.export(params, folder / "model")
  return folder / "model", jax.device_get(params)


def evaluation(exported, **fields):
  config = eval_config.get_config("arithmetic")
  config.model = str(exported[0])
  config = from_config_dict(config, EvaluationConfig)
  usual = {
    "problems": PROBLEMS,
    "samples": SAMPLES,
    "contexts": CONTEXTS,
    "batch": BATCH,
    "slots": BATCH,
    "suffix_chunks": 1,
    "temperature": 1.0,
    "mesh": dataclasses.replace(config.mesh, data=2),
  }
  return dataclasses.replace(config, **(usual | fields))


def run_evaluation(config, workdir):
  workdir.mkdir(exist_ok=True)
  with Progress(1) as progress:
    return evaluate_model(config, workdir, progress)


def read(workdir):
  return [json.loads(line) for line in (workdir / RESPONSES_FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(exported, tmp_path_factory):
  """Workdir of a whole evaluation, and its summary."""
  workdir = tmp_path_factory.mktemp("evaluated")
  return workdir, run_evaluation(evaluation(exported), workdir)


def test_the_exported_model_is_the_trained_one(exported, tmp_path):
  config = dataclasses.replace(tiny_config(), model=str(exported[0]), new_model=Config().new_model)
  with Progress(1) as progress:
    run = make_run(config, tmp_path, progress)
    jax.tree.map(np.testing.assert_array_equal, run.initial_params(), exported[1])


def test_every_problem_has_its_responses(evaluated):
  workdir, summary = evaluated
  lines = read(workdir)
  assert [line["id"] for line in lines] == list(range(PROBLEMS))
  assert summary == json.loads((workdir / SUMMARY_FILE).read_text())
  assert (summary["problems"], summary["samples"]) == (PROBLEMS, SAMPLES)
  texts = {response["text"] for line in lines for response in line["responses"]}
  assert len(texts) > PROBLEMS  # samples of a problem differ
  for line in lines:
    for response in line["responses"]:
      assert response["tokens"] < max(CONTEXTS)
      for context in CONTEXTS:
        room = context - line["prompt_tokens"]
        fits = response["finished"] and response["tokens"] <= room
        assert response["at"][str(context)]["truncated"] == (not fits)


def test_a_smaller_budget_alone_gives_the_same(evaluated, exported, tmp_path):
  small = min(CONTEXTS)
  run_evaluation(evaluation(exported, contexts=(small,)), tmp_path)
  for both, alone in zip(read(evaluated[0]), read(tmp_path), strict=True):
    for a, b in zip(both["responses"], alone["responses"], strict=True):
      assert a["at"][str(small)] == b["at"][str(small)]
      assert a["text"].startswith(b["text"])


@pytest.mark.parametrize("kept_lines", [3, 6.5, PROBLEMS])
def test_what_was_interrupted_ends_as_what_was_not(evaluated, exported, tmp_path, kept_lines):
  lines = (evaluated[0] / RESPONSES_FILE).read_bytes().splitlines(keepends=True)
  whole = int(kept_lines)
  torso = lines[whole][:50] if whole < kept_lines else b""
  (tmp_path / RESPONSES_FILE).write_bytes(b"".join(lines[:whole]) + torso)
  assert run_evaluation(evaluation(exported), tmp_path) == evaluated[1]
  assert (tmp_path / RESPONSES_FILE).read_bytes() == b"".join(lines)


def test_line_separators_within_a_text_end_no_line(evaluated, exported, tmp_path):
  lines = read(evaluated[0])
  lines[0]["responses"][0]["text"] += "\u2028 \x85"
  written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
  (tmp_path / RESPONSES_FILE).write_text(written)
  assert run_evaluation(evaluation(exported), tmp_path) == evaluated[1]


@pytest.mark.parametrize("field", ["question", "answer"])
def test_responses_to_other_problems_are_not_taken_up(evaluated, exported, tmp_path, field):
  lines = read(evaluated[0])
  lines[1][field] += " "
  (tmp_path / RESPONSES_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
  with pytest.raises(UserError, match="answers other problems than config.data holds now"):
    run_evaluation(evaluation(exported), tmp_path)


def test_a_batch_that_was_not_finished_is_done_again_whole(tmp_path):
  path = tmp_path / RESPONSES_FILE
  assert read_whole_batches(path, 4, 10) == 0
  for lines, kept in ((3, 0), (4, 4), (7, 4), (9, 8), (10, 10)):
    path.write_text("{}\n" * lines + "{")
    assert read_whole_batches(path, 4, 10) == kept
    assert path.read_text() == "{}\n" * kept


def test_accuracy_in_training_does_not_depend_on_batches(exported, tmp_path):
  config = tiny_config()
  found = []
  for batch in (16, 3):
    batched = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch=batch))
    with Progress(1) as progress:
      run = make_run(batched, tmp_path, progress)
      graded = []
      task = dataclasses.replace(
        run.task, grader=lambda text, _, graded=graded: graded.append(text)
      )
      run = dataclasses.replace(run, task=task)
      records = run.task.held_out("test", 7)
      accuracy(run, exported[1], records, temperature=1.0)
    found.append(graded)
  assert len(found[0]) == 7 and found[0] == found[1]


def test_mistakes_are_named(exported, tmp_path):
  with pytest.raises(UserError, match="batch 3 cannot be divided over the mesh"):
    run_evaluation(evaluation(exported, batch=3), tmp_path)
  with pytest.raises(UserError, match="attention 'cudnn' needs an NVIDIA GPU"):
    run_evaluation(evaluation(exported, compute=ComputeConfig(attention="cudnn")), tmp_path)
  with pytest.raises(UserError, match="has no split 'tset'"):
    run_evaluation(evaluation(exported, split="tset"), tmp_path)
  small = tmp_path / "small"
  shutil.copytree(exported[0], small)
  hf = json.loads((small / "config.json").read_text())
  (small / "config.json").write_text(json.dumps(hf | {"vocab_size": 7}))
  with pytest.raises(UserError, match=r"embed_tokens.weight \[\d+, 16\] \(not \[7, 16\]\)"):
    run_evaluation(evaluation(exported, model=str(small)), tmp_path)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"model": ""}, "config.model names no model"),
    ({"contexts": (40, 90)}, r"config.contexts \(40, 90\): each must hold a prompt"),
    ({"contexts": ()}, "each must hold"),
    ({"temperature": 0.0, "samples": 2}, "greedy responses"),
    ({"temperature": -1.0}, "must be 0"),
    ({"samples": 0}, "config.samples is 0"),
    ({"samples": 1025}, "a majority vote takes at most 1024"),
    ({"top_p": 0.0}, "config.top_p is 0.0"),
  ],
)
def test_configs_that_cannot_work_are_refused(fields, message):
  config = eval_config.get_config("arithmetic")
  config.model = "somewhere"
  config.update(fields)
  with pytest.raises(UserError, match=message):
    from_config_dict(config, EvaluationConfig)
