"""The report of a synthetic run: complete, well-formed, self-contained, safe."""

import html.parser
import json
import math
import random
import re
import subprocess
import sys

import pytest

from spo_jax import report as command
from spo_jax.errors import UserError
from spo_jax.infra import report, report_charts, report_curves, report_tree
from tests import tiny_run

VOID = {"meta", "input", "br", "hr", "link", "img"}
EVIL = '<script>alert("1")</script>'
ITERATIONS = 60


class Page(html.parser.HTMLParser):
  """Checks that tags are balanced, and collects what the tests look at."""

  def __init__(self, text: str):
    super().__init__()
    self.open_tags, self.attributes, self.texts, self.classes = [], [], [], set()
    self.scripts, self.tags, self.text_depth = [], [], math.inf
    self.feed(text)
    self.close()
    assert not self.open_tags, self.open_tags

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    self.classes |= {name for key, value in attrs if key == "class" for name in value.split()}
    if tag in VOID:
      return
    self.open_tags.append(tag)
    if ("class", "txt") in attrs:
      self.texts.append("")
      self.text_depth = len(self.open_tags)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open_tags and self.open_tags[-1] == tag, (tag, self.open_tags[-3:])
    self.open_tags.pop()
    if len(self.open_tags) < self.text_depth:
      self.text_depth = math.inf

  def handle_data(self, data):
    if self.open_tags and self.open_tags[-1] == "script":
      self.scripts.append(data)
    elif len(self.open_tags) >= self.text_depth:
      self.texts[-1] += data


def metric_rows(count: int = ITERATIONS, seed: int = 0) -> list[dict]:
  """What a run of `count` iterations records, evaluated every tenth one."""
  rng = random.Random(seed)
  rows = [{"iteration": 0, "eval/accuracy": 0.121, "eval/accuracy_greedy": 0.148}]
  rows[0] |= {"tokens/sampled": 0, "tokens/trained": 0, "time/elapsed_s": 2.1}
  elapsed, sampled, trained = 2.1, 0, 0
  for i in range(1, count + 1):
    level = 0.12 + 0.5 * (1 - math.exp(-3 * i / count))
    rollout, update = rng.uniform(0.36, 0.5), rng.uniform(0.2, 0.26)
    segments = int(900 - 300 * level + rng.uniform(-80, 80))
    sampled += 26_000 + rng.randrange(2000)
    trained += segments * 11
    elapsed += rollout + update + 0.04 + 0.9 * (i % 10 == 0)
    rows.append(
      {
        "iteration": i,
        "train/reward_mean": min(1.0, max(0.0, level + rng.gauss(0, 0.05))),
        "train/loss": -0.012 + rng.gauss(0, 0.006),
        "train/kl": 0.0004 * i / count + abs(rng.gauss(0, 4e-5)),
        "train/clip_fraction": 0.01 + abs(rng.gauss(0, 0.006)),
        "train/grad_norm": 0.3 + abs(rng.gauss(0, 0.08)),
        "train/segments": segments,
        "train/entropy": 0.9 - 0.4 * i / count,
        "tokens/sampled": sampled,
        "tokens/trained": trained,
        "time/elapsed_s": elapsed,
        "time/rollout_s": rollout,
        "time/update_s": update,
      }
    )
    if i % 10 == 0:
      rows[-1] |= {"eval/accuracy": level, "eval/accuracy_greedy": min(1, level * 1.15)}
  return rows


def _words(rng: random.Random, count: int) -> tuple[list[str], list[float]]:
  words = [
    "19",
    "-",
    "4",
    " =",
    " 15",
    "\n",
    "(",
    "6",
    " +",
    " 7",
    ")",
    " *",
    " 3",
    " so",
    " <",
    "&",
  ]
  tokens = [rng.choice(words) for _ in range(count)]
  return tokens, [round(rng.choice([0.99, 0.97, 0.95, 0.71, 0.42]), 3) for _ in tokens]


def _node(parent: int, rng: random.Random, length: int, **fields) -> dict:
  tokens, probs = _words(rng, length)
  defaults = {"value": None, "advantage": None, "reward": None, "finished": False, "probe": False}
  return {"parent": parent, "tokens": tokens, "probs": probs, **defaults, **fields}


def _rollout(method: str, nodes: list[dict], iteration: int) -> dict:
  return {
    "iteration": iteration,
    "method": method,
    "threshold": 0.9,
    "prompt": "Make 13 of the numbers 19, 4, 6 & 2.\nUse each number <once>.\n",
    "answer": "13",
    "nodes": nodes,
  }


def tree_rollout(branching=(2, 2, 2), length: int = 9, seed: int = 0, iteration: int = 1) -> dict:
  """An SPO-tree rollout; values are the means over the children."""
  rng = random.Random(seed)
  nodes = [_node(-1, rng, 0)]
  level = [0]
  for depth, count in enumerate(branching):
    following = []
    for parent in level:
      for _ in range(count):
        following.append(len(nodes))
        nodes.append(_node(parent, rng, length))
        if depth == len(branching) - 1:
          reward = float(rng.random() < 0.4)
          nodes[-1] |= {"value": reward, "reward": reward, "finished": rng.random() < 0.8}
    level = following
  for i in range(len(nodes) - 1, -1, -1):
    values = [node["value"] for node in nodes if node["parent"] == i]
    if values:
      nodes[i]["value"] = sum(values) / len(values)
  for node in nodes[1:]:
    node["advantage"] = node["value"] - nodes[node["parent"]]["value"]
  return _rollout("tree", nodes, iteration)


def chain_rollout(
  paths: int = 3, segments: int = 18, probes: int = 4, seed: int = 0, iteration: int = 1
) -> dict:
  """An SPO-chain rollout: deep paths with probes at every cut."""
  rng = random.Random(seed)
  nodes = [_node(-1, rng, 0)]

  def probe(parent: int) -> None:
    rewards = [float(rng.random() < 0.5) for _ in range(probes)]
    for reward in rewards:
      nodes.append(_node(parent, rng, 6, reward=reward, finished=True, probe=True))
    nodes[parent]["value"] = sum(rewards) / probes

  probe(0)
  for path in range(paths):
    parent = 0
    for k in range(segments):
      node = len(nodes)
      nodes.append(_node(parent, rng, 7))
      if k == segments - 1:
        reward = float(path == 0)
        nodes[node] |= {"value": reward, "reward": reward, "finished": path != 2}
      else:
        probe(node)
      nodes[node]["advantage"] = nodes[node]["value"] - nodes[parent]["value"]
      parent = node
  return _rollout("chain", nodes, iteration)


CONFIG = {
  "config_file": "configs/spo_tree.py",
  "method": "tree",
  "seed": 0,
  "iterations": ITERATIONS,
  "tree": {"branching": [2, 2, 2], "segment_tokens": 12, "note": "<b>&"},
  "optimizer": {"learning_rate": 1e-4, "warmup": {"fraction": 0.03}, "schedule": None},
  "loss": {"epsilon": 0.2, "kl_coefficient": 1e-4, "threshold": 0.9},
  "sampling": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48},
}


def write_workdir(path, rows=None, first=None, last=None, warm=True, config=CONFIG):
  """Lays out a run's folder; what is None is left out."""
  (path / "rollouts").mkdir(parents=True)
  if config is not None:
    (path / "config.json").write_text(json.dumps(config))
  if rows is not None:
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  if warm:
    lines = [{"step": i, "loss": 2.5 * math.exp(-i / 90) + 0.3} for i in range(0, 400, 5)]
    for line in lines[::20]:
      line["validation_accuracy"] = 0.12 * (1 - math.exp(-line["step"] / 80))
    (path / "warm_start.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  for name, rollout in (("first", first), ("last", last)):
    if rollout:
      (path / "rollouts" / f"{name}.json").write_text(json.dumps(rollout))
  return path


def read_page(workdir) -> tuple[str, Page]:
  text = report.write_report(workdir).read_text(encoding="utf-8")
  return text, Page(text)


def segment_texts(rollout: dict) -> list[str]:
  """What a reader should see of each segment and of the prompt, spaces aside."""
  texts = ["".join(node["tokens"]) for node in rollout["nodes"][1:]]
  return ["".join(text.split()) for text in [rollout["prompt"], *texts]]


def seen_texts(page: Page) -> list[str]:
  return ["".join(text.split()) for text in page.texts]


def test_page_is_complete(tmp_path):
  first, last = tree_rollout(seed=1), tree_rollout(seed=2, iteration=ITERATIONS)
  text, page = read_page(write_workdir(tmp_path / "run", metric_rows(), first, last))
  assert sorted(seen_texts(page)) == sorted(segment_texts(first) + segment_texts(last))
  assert "SPO-tree" in text and "configs/spo_tree.py" in text
  assert '<span class="from">12.1 →</span> 59.5%' in text
  for title in (
    "Accuracy on the test questions",
    "Train reward",
    "Loss",
    "KL",
    "Clip fraction",
    "Gradient norm",
    "Segments trained",
    "Tokens per second",
    "Seconds per iteration",
    "Warm start: loss",
    "Warm start: accuracy",
    "train/entropy",
  ):
    assert f"<h3>{title}" in text, title
  for name in ("optimizer.warmup", "kl_coefficient", "&lt;b&gt;&amp;"):
    assert f">{name}<" in text
  assert {"x-iterations", "x-tokens", "x-seconds", "x-steps"} <= page.classes


def test_page_needs_nothing_beside_it(tmp_path):
  text, page = read_page(write_workdir(tmp_path / "run", metric_rows(), tree_rollout()))
  assert not {key for key, _ in page.attributes} & {"src", "href", "srcset", "action", "data"}
  assert not {"link", "iframe", "img", "object"} & set(page.tags)
  assert "@import" not in text and "url(" not in text
  assert "http://" not in text and "https://" not in text


def test_advantages_have_colours(tmp_path):
  rollout = tree_rollout()
  for node, advantage in zip(rollout["nodes"][1:], (-1, -0.3, 0, 0.1, 0.6, 1, None), strict=False):
    node["advantage"] = advantage
  _, page = read_page(write_workdir(tmp_path / "run", first=rollout))
  boxes = {"a-n4", "a-n2", "a-0", "a-p1", "a-p3", "a-p4", "a-none"}
  assert boxes <= page.classes
  assert [report_tree.advantage_class(a, 2.0) for a in (-2, 0.01, 0.0)] == ["a-n4", "a-p1", "a-0"]
  assert report_tree.advantage_scale([rollout]) == 1.0


def test_segments_that_end_differently_look_different(tmp_path):
  rollout = tree_rollout((2,))
  rollout["nodes"][1] |= {"finished": True, "reward": 1.0}
  rollout["nodes"][2] |= {"finished": False, "reward": 0.0}
  text, _ = read_page(write_workdir(tmp_path / "run", first=rollout))
  tree = text[text.index('class="tree') :]
  done, over = tree.index('class="seg done'), tree.index('class="seg over')
  assert done < tree.index("✓ 1") < over < tree.index("✂ budget") < tree.index("✗ 0")


def test_only_uncertain_tokens_are_marked(tmp_path):
  rollout = tree_rollout((1,))
  rollout["nodes"][1] |= {"tokens": ["sure", " not<", "edge"], "probs": [0.95, 0.123, 0.9]}
  text, _ = read_page(write_workdir(tmp_path / "run", first=rollout))
  assert 'sure <u title="0.123">not&lt;</u>edge</div>' in text


def test_chain_is_flat_and_its_probes_are_folded(tmp_path):
  rollout = chain_rollout(paths=3, segments=12)
  workdir = write_workdir(tmp_path / "run", first=rollout, config=None)
  text, page = read_page(workdir)
  assert sorted(seen_texts(page)) == sorted(segment_texts(rollout))
  assert text.count('<div class="kids">') == 1
  cuts = 1 + 3 * 11
  assert text.count('<details class="probes">') == cuts
  assert "SPO-chain" in text
  folds = text.count('<details class="strand"')
  assert folds == 0
  # With more segments all paths but the first are folded.
  text, _ = read_page(write_workdir(tmp_path / "more", first=chain_rollout(3, 20), config=None))
  assert text.count('<details class="strand"') == 3
  assert text.count('<details class="strand" open') == 1


def test_text_cannot_become_markup(tmp_path):
  rollout = tree_rollout()
  rollout["prompt"] = rollout["answer"] = EVIL
  rollout["nodes"][1] |= {"tokens": ["</div>", EVIL], "probs": [0.5, 0.99]}
  rows = metric_rows(2)
  rows[1]["train/" + EVIL] = 1.0
  config = {"method": EVIL, "config_file": EVIL, EVIL: {EVIL: EVIL}}
  workdir = write_workdir(tmp_path / "run", rows, rollout, config=config)
  text, page = read_page(workdir)
  assert EVIL not in text and page.tags.count("script") == 2
  assert "".join(("</div>" + EVIL).split()) in seen_texts(page)
  data = json.loads(page.scripts[0])
  assert data["run"]["y"]["train/" + EVIL][1] == 1.0
  assert ("data-k", "train/" + EVIL) in page.attributes


def test_size_is_bounded(tmp_path):
  big = tree_rollout((6, 6, 6), length=200)
  workdir = write_workdir(tmp_path / "run", metric_rows(3000), big, big)
  text, page = read_page(workdir)
  assert len(text.encode()) < report.MAX_BYTES
  assert sum("tokens…" in seen for seen in seen_texts(page)) == 2 * 258
  data = json.loads(page.scripts[0])["run"]
  assert len(data["x"]["iterations"]) <= 2 * report_charts.MAX_POINTS
  assert data["x"]["iterations"][-1] == 3000


@pytest.mark.parametrize("rows", [None, [], [{"iteration": 0}], metric_rows(0), metric_rows(1)])
def test_early_run(tmp_path, rows):
  text, page = read_page(write_workdir(tmp_path / "run", rows, warm=False, config=None))
  assert "How to read this page" in text and not seen_texts(page)


def test_nulls_and_missing_keys(tmp_path):
  rows = metric_rows(20)
  for row in rows[5:9]:
    row["train/loss"] = None
  for row in rows:
    row.pop("eval/accuracy", None)
    row.pop("eval/accuracy_greedy", None)
    row.pop("train/kl", None)
  rollout = tree_rollout()
  for node in rollout["nodes"]:
    node |= {"value": None, "advantage": None, "reward": None}
  text, _ = read_page(write_workdir(tmp_path / "run", rows, rollout, warm=False))
  assert "No evaluation yet" in text and "<h3>KL" not in text
  assert "nan" not in text.lower().replace("nano", "")


def test_torn_last_line(tmp_path):
  workdir = write_workdir(tmp_path / "run", metric_rows(7))
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"iteration": 8, "train/lo')
  text, _ = read_page(workdir)
  assert "iteration 7 of 60" in text


def test_report_is_replaced_whole(tmp_path):
  workdir = write_workdir(tmp_path / "run", metric_rows(3))
  first = report.write_report(workdir).read_text()
  assert report.write_report(workdir).read_text() == first
  assert not list(workdir.glob("*.tmp"))


def test_command_line(tmp_path, capsys):
  workdir = write_workdir(tmp_path / "run", metric_rows(3))
  assert command.main([str(workdir)]) == 0
  assert capsys.readouterr().out.strip() == str(workdir / "report.html")
  assert command.main([str(tmp_path / "none")]) == 2
  assert capsys.readouterr().err.count("\n") == 1
  (workdir / "config.json").write_text("{")
  with pytest.raises(UserError, match="config.json"):
    report.write_report(workdir)


def test_the_command_runs_while_a_line_is_being_written(tmp_path):
  workdir = write_workdir(tmp_path / "run", metric_rows(3))
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"iteration": 4, "tra')
  words = [sys.executable, "-m", "spo_jax.report", str(workdir)]
  done = subprocess.run(words, cwd=tiny_run.REPOSITORY, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.strip() == str(workdir / "report.html")
  assert "iteration 3 of 60" in (workdir / "report.html").read_text()


@pytest.mark.parametrize(
  "config,title",
  [
    ({"method": "spo_chain"}, "SPO-chain"),
    ({"rollout": {"strategy": "tree"}}, "SPO-tree"),
    ({"rollout": {"strategy": "group"}, "advantage": {"kind": "normalized"}}, "GRPO"),
    ({"rollout": {"strategy": "group"}, "advantage": {"kind": "difference"}}, "Group baseline"),
    ({}, "Segment Policy Optimization"),
  ],
)
def test_title_names_the_method(tmp_path, config, title):
  text, _ = read_page(write_workdir(tmp_path / "run", warm=False, config=config))
  assert f"<h1>{title}</h1>" in text


def test_smooth_is_the_mean_of_the_known_neighbours():
  values = [1.0, None, 4.0, 7.0, 1.0, 2.0]
  for window in (1, 3, 5):
    half = window // 2
    for i, got in enumerate(report_charts.smooth(values, window)):
      near = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
      assert got == (None if values[i] is None else pytest.approx(sum(near) / len(near)))


def test_path_in_relative_steps_ends_where_it_should():
  rng = random.Random(0)
  points = [(rng.uniform(0, 300), rng.uniform(-20, 20)) for _ in range(50)]
  numbers = [float(n) for n in re.findall(r"-?(?:\d+\.?\d*|\.\d+)", report_charts._path(points))]
  x = y = 0.0
  for (dx, dy), (want_x, want_y) in zip(
    zip(*[iter(numbers)] * 2, strict=True), points, strict=True
  ):
    x, y = x + dx, y + dy
    assert x == pytest.approx(want_x, abs=0.051) and y == pytest.approx(want_y, abs=0.051)
  assert report_charts._path([None, (1, 2), None, (3, 4)]) == "M1 2M3 4"


def test_rates_and_rest():
  rows = [
    {"iteration": 0, "tokens/sampled": 0, "time/elapsed_s": 1.0},
    {"iteration": 1, "tokens/sampled": 100, "time/rollout_s": 2.0, "time/elapsed_s": 5.0},
    {"iteration": 2, "tokens/sampled": 400, "time/rollout_s": 3.0, "time/elapsed_s": 9.5},
  ]
  rows[1]["time/update_s"] = rows[2]["time/update_s"] = 0.5
  assert report_curves._rates(rows, "tokens/sampled", "time/rollout_s") == [None, 50.0, 100.0]
  assert report_curves._rest(rows) == [None, 1.5, 1.0]


@pytest.mark.parametrize("low,high", [(0, 1), (-0.025, 0.003), (0, 4.7e-4), (0, 81e6), (3, 3.1)])
def test_ticks_are_round_and_inside(low, high):
  ticks = report_charts.nice_ticks(low, high)
  assert 2 <= len(ticks) <= 6
  assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks)
  labels = report_charts.tick_labels(ticks, percent=False)
  assert len(set(labels)) == len(labels)
