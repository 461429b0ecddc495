"""The whole loop on real problems, with a random model of a real architecture."""

import contextlib
import dataclasses
import io
import json
import pathlib

import jax
import numpy as np
import pytest

from benchmarks import random_model
from benchmarks.run_processes import SIGNAL
from configs import spo_chain, spo_tree
from spo_jax.config import Config
from spo_jax.config_check import from_config_dict
from spo_jax.errors import UserError
from spo_jax.evaluation import evaluate
from spo_jax.infra.metrics import read_metrics
from spo_jax.infra.progress import Progress
from spo_jax.run import make_run
from spo_jax.train import train, why_unsound
from tests.training.forests import tree_forest

REPOSITORY = pathlib.Path(__file__).parents[1]
SAMPLES = REPOSITORY / "tests" / "data" / "samples"
FULL = REPOSITORY.parent / "shared" / "data"
TRAINS_NOTHING = "trains nothing"

SMALL = {
  "iterations": 3,
  "minibatches": 1,
  "epochs": 1,
  "compute.dtype": "float32",
  "compute.remat": "none",
  "data.grader_workers": 2,
  "rollout.prompts": 4,
  "rollout.samples": 2,
  "rollout.probes": 2,
  "rollout.branches": (4, 2),
  "rollout.segment_tokens": (4,),
  "rollout.max_prompt_tokens": 192,
  "rollout.max_response_tokens": 8,
  "rollout.slots": 4,
  "rollout.suffix_chunks": 1,
  "rollout.temperature": 1.0,
  "rollout.top_p": 1.0,
  "packing.row_length": 256,
  "packing.rows": 4,
  "packing.query_block": 32,
  "packing.key_block": 16,
  "packing.logprob_chunk": 256,
  "eval.split": "test",
  "eval.prompts": 100,  # more than there are
  "eval.batch": 4,
  "optimizer.learning_rate": 1e-2,
  "optimizer.decay_steps": 0,
  "optimizer.warmup_steps": 0,
  "eval.every": 1000,
  "checkpoint.every": 1000,
  "mesh.data": 1,
  "mesh.fsdp": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Folder of a Qwen2 of 2 layers and 32 channels."""
  folder = tmp_path_factory.mktemp("models") / "qwen2"
  texts = random_model.read_texts(SAMPLES)
  random_model.write_model(
    folder, texts, family="qwen2", layers=2, width=32, vocab_size=512, seed=0
  )
  return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Where the sets of all runs are built."""
  return tmp_path_factory.mktemp("sets")


def configure(module, variant, model, data_dir, manual_dir=SAMPLES, **overrides) -> Config:
  """One of the paper's experiments, small; a field `a.b` is given as the keyword `a__b`."""
  config = module.get_config(variant)
  fields = {
    **SMALL,
    "model": str(model),
    "data.manual_dir": str(manual_dir),
    "data.data_dir": str(data_dir / pathlib.Path(manual_dir).name),
    **{name.replace("__", "."): value for name, value in overrides.items()},
  }
  config.update_from_flattened_dict(fields)
  return from_config_dict(config, Config)


@dataclasses.dataclass
class Trained:
  """What a run leaves."""

  metrics: list[dict]
  told: list[str]  # lines on the screen
  before: dict  # parameters
  after: dict
  texts: list[list[str]]  # responses to train on, by iteration

  def column(self, name: str) -> list[float]:
    """A metric of all iterations."""
    return [line[name] for line in self.metrics[1:]]


def run_once(config: Config, workdir: pathlib.Path) -> Trained:
  screen, texts = io.StringIO(), []
  with (
    Progress(config.iterations, screen) as progress,
    contextlib.closing(make_run(config, workdir, progress)) as run,
  ):
    before = jax.device_get(run.initial_params())
    grade = run.task.grade

    def listen(responses, answers, *, shaped=False):
      if shaped:
        texts.append(list(responses))
      return grade(responses, answers, shaped=shaped)

    object.__setattr__(run.task, "grade", listen)
    after = jax.device_get(train(run))
  return Trained(read_metrics(workdir), screen.getvalue().splitlines(), before, after, texts)


def moved(trained: Trained) -> bool:
  """Whether any bit of the parameters changed."""
  same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), trained.before, trained.after)
  return not all(jax.tree.leaves(same))


def assert_finite(trained: Trained) -> None:
  values = [value for line in trained.metrics for value in line.values()]
  assert None not in values and np.all(np.isfinite(values))


@pytest.mark.parametrize(
  "module, variant, grader, manual_dir",
  [
    (spo_chain, "rho1b_gsm8k", "gsm8k", SAMPLES),
    (spo_tree, "rho1b_math", "math", SAMPLES),
    (spo_chain, "rho1b_math", "math", FULL),
    (spo_tree, "rho1b_gsm8k", "gsm8k", FULL),
  ],
  ids=["chain-gsm8k", "tree-math", "chain-math-full", "tree-gsm8k-full"],
)
def test_without_reward_nothing_is_trained_and_that_is_told_once(
  module, variant, grader, manual_dir, model, data_dir, tmp_path
):
  if not manual_dir.is_dir():
    pytest.skip("the full data sets are not in ../shared/data")
  # A random model may hit upon an answer of MATH, as any number stands for one.
  config = configure(
    module,
    variant,
    model,
    data_dir,
    manual_dir,
    advantage__grade_unfinished=grader == "gsm8k",
    advantage__train_zero=False,
  )
  assert config.loss.kl_coef > 0 and config.optimizer.weight_decay == 0
  trained = run_once(config, tmp_path)
  assert len(trained.texts) == config.iterations
  told = [line for line in trained.told if TRAINS_NOTHING in line]
  number = len(trained.texts[0])
  assert len(told) == 1
  assert told[0].startswith("iteration 1 ")
  assert f"all {number} responses have reward 0 from config.data.grader '{grader}'" in told[0]
  assert not moved(trained)
  assert_finite(trained)
  assert trained.column("train/reward_mean") == [0.0] * 3
  assert trained.column("train/skipped") == [1.0] * 3
  assert trained.column("train/tokens") == [0] * 3
  # A response without an answer is wrong, no failure of the grader.
  assert trained.column("train/grader_failures") == [0] * 3


def test_a_reward_that_can_be_earned_is_learnt(model, data_dir, tmp_path):
  config = configure(
    spo_tree,
    "rho1b_gsm8k",
    model,
    data_dir,
    **SIGNAL,
    iterations=12,
  )
  trained = run_once(config, tmp_path)
  reward = trained.column("train/reward_mean")
  assert_finite(trained)
  assert moved(trained)
  told = [int(line.split()[1]) for line in trained.told if TRAINS_NOTHING in line]
  assert all(trained.metrics[iteration]["train/tokens"] == 0 for iteration in told)
  # Over the problems that there are, which are fewer than eval.prompts.
  assert trained.metrics[-1]["eval/accuracy"] > trained.metrics[0]["eval/accuracy"] + 0.4
  assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.4


def test_failures_of_the_grader_are_counted_and_the_run_goes_on(model, data_dir, tmp_path):
  config = configure(
    spo_tree,
    "rho1b_gsm8k",
    model,
    data_dir,
    data__grader="tests.rewards.hostile:by_length",
    data__grader_timeout_s=0.5,
    advantage__grade_unfinished=True,
  )
  trained = run_once(config, tmp_path)
  failing = [sum(len(text) % 4 < 2 for text in texts) for texts in trained.texts]
  assert min(failing) > 0 and len(failing) == 3
  assert trained.column("train/grader_failures") == failing
  assert sum(trained.column("train/tokens")) > 0
  assert moved(trained)
  assert_finite(trained)


@pytest.fixture(scope="module")
def without_grader(model, data_dir):
  """A config whose grader always fails."""
  return configure(
    spo_chain,
    "rho1b_gsm8k",
    model,
    data_dir,
    data__grader="tests.rewards.hostile:fail",
    advantage__unfinished_penalty=-1.0,
    advantage__train_zero=False,
    checkpoint__every=1,
  )


def test_a_grader_that_always_fails_is_told(without_grader, tmp_path):
  iterations = without_grader.iterations
  config = dataclasses.replace(without_grader, unstable_limit=iterations + 1)
  trained = run_once(config, tmp_path)
  (told,) = [line for line in trained.told if TRAINS_NOTHING in line]
  number = len(trained.texts[0])
  finished = trained.column("train/finished")
  assert finished[0] == 0 and trained.column("train/reward_mean") == [f - 1 for f in finished]
  assert f"all {number} responses have reward -1" in told
  assert f"{number} were cut off at config.rollout.max_response_tokens 8" in told
  assert f"the grader failed on {number}" in told
  assert not moved(trained)


def test_a_grader_that_is_gone_stops_the_run_which_saves_nothing_of_it(without_grader, tmp_path):
  """By all of three responses it is gone, by three of four it is not."""
  metrics = {"train/grader_failures": 3, "train/unstable": 0}
  rng = np.random.default_rng(0)
  forest = lambda n: tree_forest(rng, (n,), (2,), prompts=(2,))
  assert "failed on all of the last 3 responses" in why_unsound(without_grader, forest(3), metrics)
  assert why_unsound(without_grader, forest(4), metrics) is None
  lost = forest(4)._replace(logprobs=np.full_like(forest(4).logprobs, np.nan))
  assert "parameters that are not finite" in why_unsound(without_grader, lost, metrics)
  with pytest.raises(UserError, match="stopped at iteration 2, .*hostile:fail' failed on all"):
    run_once(dataclasses.replace(without_grader, unstable_limit=2), tmp_path)
  assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_evaluation_sets_that_no_batch_divides_on_a_mesh(model, data_dir, tmp_path):
  """3 problems are fewer than 8 devices, and no multiple of a batch of 2."""
  graded = []
  for batch, devices in ((8, 8), (2, 1)):
    config = configure(
      spo_tree,
      "rho1b_gsm8k",
      model,
      data_dir,
      eval__batch=batch,
      eval__prompts=3,
      mesh__data=devices,
      rollout__prompts=8,
      rollout__slots=8,
      packing__rows=8,
    )
    with Progress(1, io.StringIO()) as progress:
      run = make_run(config, tmp_path, progress)
      task = dataclasses.replace(
        run.task, grader=lambda text, _: graded.append(text) or float(len(graded) % 3 == 0)
      )
      run = dataclasses.replace(run, task=task)
      records = task.held_out(config.eval.split, config.eval.prompts)
      metrics = evaluate(run, run.initial_params(), records)
    assert metrics == {"eval/accuracy": 1 / 3, "eval/accuracy_greedy": 1 / 3}
  assert len(graded) == 12 and graded[:6] == graded[6:]


def test_random_models_tell_what_they_cannot_be_made_of(tmp_path):
  (tmp_path / "own.jsonl").write_text(json.dumps({"ask": "1+1", "answer": None}) + "\n")
  with pytest.raises(UserError, match="no .*.jsonl with texts in the fields question, problem"):
    list(random_model.read_texts(tmp_path))
  assert list(random_model.read_texts(tmp_path, ["ask"])) == ["1+1"]
  tokenizer = random_model.build_tokenizer(iter(["1+1"]), 512)
  text = "17 apples: ÿ☃"
  assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
  for width in (6, 192):
    with pytest.raises(UserError, match=f"--width {width}"):
      random_model.model_config("qwen2", 1, width, len(tokenizer))
