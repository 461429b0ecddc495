"""From finished runs to rates, tables and curves; the runs are synthetic."""

import json
import math

import numpy as np
import pytest

from benchmarks import compare
from benchmarks.comparison import plots, tables
from benchmarks.comparison.budgets import Pace
from benchmarks.comparison.figures import figures, interval, paired
from benchmarks.comparison.runs import Maker
from benchmarks.comparison.stages import Comparison
from tests.benchmarks.synthetic import finish, rows, write

SEEDS = (0, 1, 2)
PACES = {"arithmetic": {"spo_tree": Pace(1000.0, 2.0), "grpo": Pace(500.0, 1.0)}}


class Pretender(Maker):
  """Makes runs at once; `reached` tells their final accuracy."""

  def __init__(self, reached):
    super().__init__()
    self.reached, self.made = reached, []

  def make(self, runs, *, jobs=None):
    self.asked |= {run.workdir: run for run in runs}
    for run in self.ready(runs):
      self.made.append(run)
      finish(run, self.reached(run), tokens=1000 if "spo_tree" in run.config else 500)


def comparison(tmp_path, reached, *words, paces=PACES, rates=None):
  usual = [f"--folder={tmp_path}", "--methods", "spo_tree", "grpo", "--tasks", "arithmetic"]
  usual += ["--seeds", *map(str, SEEDS), "--sweep_seeds", "9", "--tokens=20000"]
  args = compare.parse_args([*usual, "--rates", "1e-4", "2e-4", "4e-4", *words])
  made = compare.make_plan(args)
  return Comparison(made, Pretender(reached), dict(paces), rates or {})


def reached(run):
  """SPO-tree is best at 2e-4, GRPO at 1.6e-3; seeds are worth 0.02 each."""
  fields = run.fields
  peak = 2e-4 if "spo_tree" in run.config else 1.6e-3
  octaves = abs(math.log2(fields.get("optimizer.learning_rate", peak) / peak))
  gap = 0.05 if "spo_tree" in run.config else 0.0
  return 0.6 + gap + 0.02 * fields["seed"] - 0.1 * octaves


def test_interval_is_that_of_student():
  mean, half, count = interval([1.0, 2.0, 3.0, 4.0])
  assert (mean, count) == (2.5, 4)
  # 3.182 is the 0.975 quantile with three degrees of freedom, in any table of t.
  assert half == pytest.approx(3.182 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=1e-3)
  assert interval([0.5]) == (0.5, None, 1)


def test_differences_are_paired_by_seed():
  ours, theirs = {0: 0.5, 1: 0.7, 2: 0.9}, {1: 0.6, 2: 0.8, 3: 0.0}
  difference = paired(ours, theirs)
  assert difference.mean == pytest.approx(0.1) and difference.count == 2
  assert difference.half == pytest.approx(0.0, abs=1e-9)  # seeds differ, differences do not
  assert paired({0: 0.5}, {1: 0.5}) is None


def test_figures_of_a_run(tmp_path):
  write(tmp_path, rows(10, 0.7, every=4, tokens=1000, seconds=2.0))
  found = figures(tmp_path, updates=3)
  assert found["accuracy"] == pytest.approx(0.7) and found["accuracy_before"] == 0.2
  assert found["accuracy_greedy"] == pytest.approx(0.8)
  assert found["sampled_tokens"] == 10_000 and found["updates"] == 30
  assert found["seconds"] == pytest.approx(20.0)
  assert [point["iteration"] for point in found["curve"]] == [0, 4, 8, 10]
  assert figures(tmp_path, updates=3, paced=Pace(1000.0, 5.0))["seconds"] == 50.0


def test_sweep_goes_beyond_its_grid_and_chooses(tmp_path):
  made = comparison(tmp_path, reached)
  made.warm_start()
  assert len(made.maker.made) == len(SEEDS) + 1
  made.sweep()
  chosen = json.loads((tmp_path / "rates.json").read_text())
  assert chosen == {"arithmetic": {"tokens": {"spo_tree": 2e-4, "grpo": 1.6e-3}}}
  tried = [made.swept(cell)[0] for cell in made.cells()]
  assert tried == [[1e-4, 2e-4, 4e-4], [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]]
  before = len(made.maker.made)
  made.sweep()
  assert len(made.maker.made) == before
  comparison(tmp_path, reached, "--methods", "grpo").sweep()
  assert json.loads((tmp_path / "rates.json").read_text()) == chosen


def test_a_sweep_stops_at_the_edge_after_its_extensions(tmp_path):
  made = comparison(tmp_path, reached, "--extensions=1")
  made.warm_start()
  made.sweep()
  made.test()
  text = tables.page(made.results("arithmetic", "tokens"))
  assert "it was extended by 0.0008." in text
  assert "The best rate of grpo is still the last that was tried." in text
  assert "The best rate of spo_tree" not in text


def test_given_rates_spare_the_sweep(tmp_path):
  rates = {"arithmetic": {"tokens": {"spo_tree": 2e-4, "grpo": 8e-4}}}
  made = comparison(tmp_path, reached, rates=rates)
  made.warm_start()
  made.sweep()
  made.test()
  assert not (tmp_path / "arithmetic" / "tokens" / "sweep").exists()
  assert {m["rate"] for m in made.results("arithmetic", "tokens")["methods"]} == {2e-4, 8e-4}


def test_one_arm_may_choose_the_rates_of_another(tmp_path):
  words = ("--arms", "prompts", "--sweep_arm=tokens", "--prompts=32", "--updates=60")
  made = comparison(tmp_path, reached, *words)
  made.warm_start()
  made.sweep()
  assert not (tmp_path / "arithmetic" / "prompts" / "sweep").exists()
  chosen = json.loads((tmp_path / "rates.json").read_text())
  assert chosen == {"arithmetic": {"prompts": {"spo_tree": 2e-4, "grpo": 1.6e-3}}}
  made.test()
  tree, grpo = made.results("arithmetic", "prompts")["methods"]
  assert [run["updates"] for run in (tree["runs"][0], grpo["runs"][0])] == [60, 60]
  uncalibrated = comparison(tmp_path, reached, *words, paces={})
  assert uncalibrated.cells() == [] and len(uncalibrated.uncalibrated()) == 2


def test_no_rates_are_the_configs_own(tmp_path):
  words = ("--arms", "own", "--rates", "--methods", "spo_tree", "spo_chain")
  made = comparison(tmp_path, lambda run: 0.5, *words)
  made.warm_start()
  assert len(made.maker.made) == len(SEEDS)
  made.sweep()
  made.test()
  methods = made.results("arithmetic", "own")["methods"]
  assert [(m["rate"], m["sweep"], len(m["runs"])) for m in methods] == [
    (4e-4, [], 3),
    (4e-4, [], 3),
  ]


def test_gains_have_a_sign_in_the_table(tmp_path):
  worse_first = lambda run: 1 - reached(run)
  made = comparison(tmp_path, worse_first, "--rates")
  made.warm_start()
  made.test()
  text = tables.comparison_table(made.results("arithmetic", "tokens"))
  assert "| +0.050 ± 0.000 |" in text


def test_table_and_its_notes(tmp_path):
  made = comparison(tmp_path, reached)
  for stage in (made.warm_start, made.sweep, made.test):
    stage()
  result = made.results("arithmetic", "tokens")
  lines = tables.page(result).splitlines()
  assert lines[0] == "## arithmetic, equal tokens: 0.02 million sampled tokens"
  tree = next(line for line in lines if line.startswith("| spo_tree")).split(" | ")
  grpo = next(line for line in lines if line.startswith("| grpo")).split(" | ")
  assert tree[1:7] == ["0.0002", "3", "20", "60", "0.02", "40"]
  assert grpo[1:7] == ["0.0016", "3", "40", "120", "0.02", "40"]
  # Seeds 0, 1, 2 are 0.02 apart: 4.303 * 0.02 / sqrt(3); paired, they do not enter.
  assert tree[7:10] == ["0.200", "0.670 ± 0.050", ""]
  assert grpo[7:10] == ["0.200", "0.620 ± 0.050", "-0.050 ± 0.000"]
  assert result["methods"][0]["runs"][0]["command"].startswith("python -m spo_jax.main --workdir=")
  text = "\n".join(lines)
  assert "95% t-interval of the mean over seeds" in text and "differs between" not in text
  result["methods"][1]["runs"][1]["accuracy_before"] = 0.3
  result["methods"][1]["runs"][0]["sampled_tokens"] *= 2
  text = tables.page(result)
  assert "accuracy_before differs between methods in seeds [1]." in text
  assert "grpo sampled +33% of the tokens" in text


def test_the_command_writes_everything_and_tells_what_is_left(tmp_path, capsys):
  made = comparison(tmp_path, reached)
  for stage in (made.warm_start, made.sweep, made.test):
    stage()
  paces = {
    "arithmetic": {
      n: {"tokens": p.tokens, "seconds": p.seconds} for n, p in PACES["arithmetic"].items()
    }
  }
  (tmp_path / "calibration.json").write_text(json.dumps(paces))
  words = [f"--folder={tmp_path}", "--methods", "spo_tree", "grpo", "--tasks", "arithmetic"]
  words += ["--seeds", "0", "1", "2", "--sweep_seeds", "9", "--tokens=20000"]
  words += ["--rates", "1e-4", "2e-4", "4e-4"]
  assert compare.main(words) == 0
  folder = tmp_path / "arithmetic" / "tokens"
  text = (folder / "table.md").read_text()
  assert text in capsys.readouterr().out
  assert f"by `python -m benchmarks.compare --folder={tmp_path} --methods" in text
  assert len(json.loads((folder / "results.json").read_text())["methods"][1]["runs"]) == 3
  (folder / "test" / "grpo-lr0.0016-seed1" / "report.html").unlink()
  assert compare.main([*words, "--deadline_s=0"]) == compare.LEFT_STATUS
  assert "1 runs are left" in capsys.readouterr().err
  assert len(json.loads((folder / "results.json").read_text())["methods"][1]["runs"]) == 2
  assert compare.main([*words, "--env", "A"]) == compare.USER_ERROR_STATUS
  assert capsys.readouterr().err == ("compare: --env 'A' sets no variable: give KEY=VALUE\n")


def test_labels_do_not_overlap():
  placed = plots.spaced([0.5, 0.51, 0.9, 0.505], 0.05)
  assert placed[2] == 0.9
  assert sorted(placed[i] for i in (0, 3, 1)) == [placed[0], placed[3], placed[1]]
  assert np.diff(sorted(placed)).min() >= 0.05 - 1e-9
  assert np.mean([placed[0], placed[1], placed[3]]) == pytest.approx(0.505)


def test_mean_curve_and_styles():
  runs = [
    {"curve": [{"updates": 0, "accuracy": 0.2}, {"updates": 8, "accuracy": 0.4 + bonus}]}
    for bonus in (0.0, 0.2)
  ]
  at, mean, half = plots.curve({"runs": runs}, "updates").T
  np.testing.assert_allclose([at, mean], [[0, 8], [0.2, 0.5]])
  np.testing.assert_allclose(half, [0.0, 12.706 * 0.1], rtol=1e-3)
  methods = [{"config": name} for name in ("a", "b", "a")]
  tree, grpo, control = plots.styles(methods)
  assert tree["color"] == control["color"] != grpo["color"]
  assert tree["linestyle"] == grpo["linestyle"] != control["linestyle"]


def test_curves_are_drawn_or_said_not_to_be(tmp_path, monkeypatch):
  made = comparison(tmp_path, reached)
  for stage in (made.warm_start, made.sweep, made.test):
    stage()
  result = made.results("arithmetic", "tokens")
  path = tmp_path / "curves.png"
  with monkeypatch.context() as without:
    without.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert "matplotlib is not installed" in plots.draw(result, path)
    assert not path.exists()
  pytest.importorskip("matplotlib")
  assert plots.draw(result, path) == f"curves: {path}"
  assert path.read_bytes().startswith(b"\x89PNG")
