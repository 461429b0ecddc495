"""The benchmark of size at tiny sizes: figures, the least of a step by hand, mistakes."""

import dataclasses
import json
import time
import types

import pytest

from benchmarks import peers, scaling, scaling_account, scaling_points, timing
from benchmarks.comparison import plots
from benchmarks.scaling_points import Point, least_of_steps, roofline
from spo_jax.infra.compilation import made_programs
from spo_jax.planning.minimum import Work, step_work

TINY = "--model 1x32x48 --repeats 2 --prompt 5 --new 4 --context-new 2 --context-prompts 2"
TINY += " --samples 3 --segment 1 --leaves 8"
RATES = {"matmul_gflops": 1.0, "copy_gb_s": 2.0}


@pytest.fixture(scope="module")
def model():
  return peers.random_model(1, 32, 48)


@pytest.fixture(scope="module")
def programs_of_repeats():
  """Programs that calls after the first have compiled, of each measurement of the run."""
  return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory, programs_of_repeats):
  """Of a run of one size, with the account of a step."""
  path = tmp_path_factory.mktemp("scaling")

  def counted(calls, repeats):
    first = timing.in_turn(calls, 0)
    before = made_programs().programs
    timed = timing.in_turn(calls, repeats)
    programs_of_repeats.append(made_programs().programs - before)
    return {name: one._replace(first_s=first[name].first_s) for name, one in timed.items()}

  words = "--axes branches --branches 2 --account context=6 --json "
  words += f"{path / 'found.json'} --plot {path / 'found.png'}"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scaling, "machine_rates", lambda dtype: RATES)
    for module in (scaling_points, scaling_account):
      patch.setattr(module, "in_turn", counted)
    assert scaling.main([*TINY.split(), *words.split()]) == 0
  return path


@pytest.fixture(scope="module")
def record(folder):
  return json.loads((folder / "found.json").read_text())


def test_points_have_their_figures(record):
  (point,) = record["points"]
  assert (point["axis"], point["size"], point["continuations"]) == ("branches", 2, 8)
  assert point["tokens"] == 2 + 4 + 8
  for name in ("tokens_per_s", "step_s"):
    assert 0 < point[name]["least"] <= point[name]["median"] <= point[name]["most"]
  assert point["efficiency"] == point["roofline_s"] / point["step_s"]["median"]
  by_hand = max(point["step_flops"] / 1e9, point["step_bytes"] / 2e9)
  assert point["roofline_s"] == pytest.approx(by_hand)
  # A call outlasts its three steps, and compiling is in the first call alone.
  assert point["tokens"] / point["tokens_per_s"]["most"] > 3 * point["step_s"]["least"]
  assert point["first_s"] > point["compile_s"] > 0
  assert point["prefill_s"] > 0 and point["extend_s"] > 0
  assert point["peak_bytes"] > 4 * record["parameters"] > 4 * 48 * 32
  assert record["matmul_gflops"] == 1 and record["dtype"] == "float32"


def test_a_step_is_taken_apart(record):
  parts = record["parts"]
  assert list(parts) == ["blocks", "prefix", "suffix", "cache write", "unembedding", "draw"] + [
    scaling_account.WHOLE,
    scaling_account.SUM,
  ]
  *of_step, whole, total = parts.values()
  for name in ("flops", "bytes"):
    assert whole[name] == pytest.approx(sum(part[name] for part in of_step))
  assert total["seconds"]["median"] == sum(part["seconds"]["median"] for part in of_step)


def test_a_picture_is_drawn_where_it_can_be(folder, record, monkeypatch):
  if not plots.no_matplotlib(folder / "found.png"):
    assert (folder / "found.png").read_bytes()[1:4] == b"PNG"
  monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
  told = scaling.scaling_plot.draw(record, folder / "none.png")
  assert "matplotlib is not installed" in told and not (folder / "none.png").exists()


def test_the_least_of_a_step_by_hand(model):
  """Heads of 16 numbers: 2 of queries, 1 of keys. A group sees 7 tokens of its prefix; each of its
  3 continuations sees 4 of its own, the newest of which it writes."""
  assert (model.cfg.heads, model.cfg.kv_heads, model.cfg.head_dim) == (2, 1, 16)
  matrices = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96
  biases = 4 * 16  # of queries, of keys and of values: two axes as matrices have
  rows, token = 2 * 3, 2 * 16 * 4
  found = step_work(model.cfg, model.params, 2, 3, 7, 4)
  assert found == {
    "blocks": Work(2 * rows * (matrices + biases), 4 * (matrices + biases)),
    "prefix": Work(rows * 7 * 4 * 32, 2 * 7 * token),
    "suffix": Work(rows * 4 * 4 * 32, rows * 3 * token),
    "cache write": Work(0, rows * token),
    "unembedding": Work(2 * rows * 32 * 48, 4 * 32 * 48 + 4 * rows * 48),
    "draw": Work(0, 4 * rows * 48),
  }
  assert roofline({"a": Work(3e9, 1e9), "b": Work(1e9, 7e9)}, RATES) == {
    "matmul_s": 4.0,
    "copy_s": 4.0,
  }
  half = step_work(dataclasses.replace(model.cfg, dtype="bfloat16"), model.params, 2, 3, 7, 4)
  assert half["prefix"].accessed == 7 * token and half["draw"] == found["draw"]


def test_steps_of_a_tree_see_ever_more(model):
  point = Point("branches", 2, 3, (2, 2, 2), prompt=5, new=2)
  steps = list(least_of_steps(model, point))
  assert len(steps) == point.steps == 6
  token = 2 * 16 * 4
  # Groups and continuations double by level; of the last prefix token keys and values are fed.
  assert [step["prefix"].accessed for step in steps] == [
    groups * tokens * token for groups, tokens in ((3, 4), (6, 6), (12, 8)) for _ in range(2)
  ]
  assert [step["suffix"].accessed for step in steps] == [0, 6 * token, 0, 12 * token, 0, 24 * token]


def test_a_call_after_the_first_compiles_nothing(folder, programs_of_repeats):
  assert programs_of_repeats == [0, 0]  # the point and the account


def test_mistakes_are_told_before_anything_is_compiled(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(scaling, "machine_rates", lambda dtype: pytest.fail("too late"))
  for words, told in (
    ("--model huge", "--model huge must be one of tiny, small"),
    ("--model 1x0x48", "--model 1x0x48"),
    ("--model 1x34x48", "--width 34"),
    ("--repeats 0", "--repeats 0 must be at least 1"),
    ("--batch 8 -1", "--batch -1 must be at least 1"),
    ("--context-new 0", "--context-new 0"),
    ("--branches 3", "--branches 3 makes trees of 27 leaves, which do not divide --leaves 8"),
    ("--account batch", "--account batch must be AXIS=SIZE"),
    ("--account depth=3", "--account depth=3"),
    ("--account branches=3", "--branches 3 makes trees"),
    ("--axes", "--axes names none"),
    ("--axes --account --plot a.png", "--plot has nothing to draw"),
    ("--plot a.pdf", "--plot a.pdf must end in .png"),
    (f"--json {tmp_path}/none/a.json", "there is no folder"),
    ("--batch 1000000000", "--batch 1000000000 must hold"),
  ):
    assert scaling.main([*TINY.split(), "--branches", "2", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scaling: ") and told in line
  for words in ("--dtype float64", "--axes depth", "--batch few"):
    with pytest.raises(SystemExit):
      scaling.parse_args(words.split())


def test_what_a_point_must_hold(model):
  point = Point("context", 6, 2, (3,), prompt=6, new=4)
  parameters = 2 * 32 * 48 + 3 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96 + 4 * 16
  cache = 2 * 16 * (2 * 6 + 6 * 4)
  assert scaling_points.held_bytes(model, point) == 4 * (parameters + cache + 6 * 48)


def test_the_clock_adds_the_calls_of_a_verb():
  slow = types.SimpleNamespace(extend=lambda seconds: time.sleep(seconds))
  sampler = scaling_points.Clocked(slow)
  sampler.restart()
  for _ in range(2):
    sampler.extend(0.02)
  assert sampler.seconds["extend"] >= 0.04 and sampler.seconds["decode"] == 0
  sampler.restart()
  assert sampler.seconds["extend"] == 0
