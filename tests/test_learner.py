"""The learner: what an update keeps, and what it begins anew."""

import contextlib
import types

import jax
import numpy as np
import pytest

from configs import restem
from spo_jax.config import Config
from spo_jax.config_check import from_config_dict
from spo_jax.forest import prune
from spo_jax.infra.compilation import made_programs
from spo_jax.infra.mesh import make_mesh
from spo_jax.learner import Learner, TrainingSet
from spo_jax.training import packing
from tests.tiny import tiny_config, tiny_params
from tests.training.forests import chain_forest, own_segments, tree_forest

MODEL = tiny_config(layers=1)
FOREST = tree_forest(np.random.default_rng(4), (3,), (7,), prompts=(3, 2, 4, 3), ragged=True)
ADVANTAGES = np.random.default_rng(0).random(len(FOREST.parent)).astype(np.float32)


class Silent:
  @contextlib.contextmanager
  def bar(self, name, total):
    yield lambda done: None


def learner(**overrides) -> Learner:
  config = restem.get_config()
  fields = {
    "rollout.prompts": 4,
    "rollout.samples": 3,
    "rollout.max_prompt_tokens": 4,
    "rollout.max_response_tokens": 7,
    "packing.row_length": 32,
    "packing.rows": 1,
    "packing.query_block": 16,
    "packing.key_block": 8,
    "minibatches": 2,
    "epochs": 1,
    "loss.kl_coef": 0.1,
    "loss.kl_control": "adaptive",
    "loss.kl_horizon": 30,
  }
  config.update_from_flattened_dict(
    fields | {k.replace("__", "."): v for k, v in overrides.items()}
  )
  run = types.SimpleNamespace(
    config=from_config_dict(config, Config),
    mesh=make_mesh(1, 1, 1),
    model=MODEL,
    progress=Silent(),
  )
  return Learner(run, tiny_params(MODEL))


def host(tree):
  return jax.tree.map(np.array, tree)  # a copy: the next update donates


def same(a, b) -> bool:
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.all(x == y)), a, b)))


@pytest.mark.parametrize("restart", [True, False])
def test_a_restart_trains_the_first_policy_anew(restart):
  trained = TrainingSet(FOREST, ADVANTAGES, own_segments(FOREST))
  # The weight of the KL is another by the second update: a likelihood's restart is exact without.
  learning = learner(restart=restart, loss__kl_in="loss", loss__kl_control="fixed")
  learning.update(trained)
  first = host(learning.arrays())
  assert int(first.step) == 2
  made = made_programs()
  learning.update(trained)
  assert made_programs() == made
  assert same(host(learning.arrays()), first) == restart
  assert not same(first.params, tiny_params(MODEL))


@pytest.mark.parametrize("trees", [4, 2])  # 2: the others were not drawn from the buffer
def test_the_weight_of_the_kl_follows_what_was_measured(trees):
  learning = learner()
  forest, kept = prune(FOREST, FOREST.tree < trees)
  trained = TrainingSet(forest, ADVANTAGES[kept], own_segments(forest))
  metrics = learning.update(trained)
  assert metrics["train/kl_coef"] == 0.1 and metrics["train/kl"] < 0.008
  weight = learning.record()["kl_coef"]
  np.testing.assert_allclose(weight, 0.1 * (1 - 0.2 * 12 / 30))  # 12 responses
  # Where nothing was trained, no KL was measured.
  metrics = learning.update(trained._replace(trained=np.zeros(len(kept), bool)))
  assert metrics["train/skipped"] == 1
  assert learning.record()["kl_coef"] == weight


def spans(nodes):
  """(first, end) of the tokens of chosen nodes."""
  return [FOREST.offsets[node : node + 2] for node in np.flatnonzero(nodes)]


def test_what_the_loss_does_not_read_is_not_packed_and_no_update_is_empty():
  rng = np.random.default_rng(5)
  unlikely = np.log(np.where(rng.random(len(FOREST.tokens)) < 0.3, 0.3, 0.99)).astype(np.float32)
  trained = own_segments(FOREST)
  chosen = TrainingSet(FOREST._replace(logprobs=unlikely), ADVANTAGES, trained)
  # All rows fit a micro-batch.
  fields = {"packing__rows": 8, "loss__kl_control": "fixed"}
  found = {}
  for mask in (True, False):
    learning = learner(loss__use_probability_mask=mask, **fields)
    found[mask] = learning.update(chosen)
    assert found[mask]["train/skipped"] == 0  # of both updates
    assert found[mask]["train/segments"] == trained.sum()
  assert found[False]["train/packed_tokens"] == len(FOREST.tokens)
  in_loss = unlikely < np.log(0.9)
  last = [np.flatnonzero(in_loss[a:b]).max(initial=-1) + 1 for a, b in spans(trained)]
  prompts = FOREST.lengths[FOREST.depth == 0].sum()
  assert found[True]["train/packed_tokens"] == prompts + sum(last) < 0.9 * len(FOREST.tokens)
  assert 0 < found[True]["train/tokens"] < found[False]["train/tokens"]


CORRECTED = {"restart": False, "loss__kind": "ppo_clip", "loss__importance_cap": 2.0}


@pytest.mark.parametrize("mask, places, loss", [(True, 16, CORRECTED), (False, 32, {})])
def test_places_for_what_the_loss_reads_change_no_update(monkeypatch, mask, places, loss):
  rng = np.random.default_rng(6)
  unlikely = np.log(np.where(rng.random(len(FOREST.tokens)) < 0.3, 0.3, 0.99)).astype(np.float32)
  forest = FOREST._replace(logprobs=unlikely)
  chosen = TrainingSet(forest, ADVANTAGES, own_segments(forest))
  packed = []
  pack = packing.pack

  def watched(*args, **kwargs):
    packed.append(pack(*args, **kwargs)[0])
    return packed[-1], pack(*args, **kwargs)[1]

  monkeypatch.setattr(packing, "pack", watched)
  # One update: which rows an update has may differ.
  fields = {"loss__use_probability_mask": mask, "loss__kl_control": "fixed", "minibatches": 1}
  fields |= loss
  found = [learner(packing__loss_length=n, **fields).update(chosen) for n in (0, 16)]
  assert [batch.targets.shape[-1] for batch in packed] == [32, places]
  names = ("logprob_gap", "importance_weight") if loss else ()
  for name in ("loss", "grad_norm", "kl", "tokens", "segments", "packed_tokens", *names):
    np.testing.assert_allclose(found[1][f"train/{name}"], found[0][f"train/{name}"], rtol=1e-5)


def test_an_iteration_has_as_many_updates_as_epochs_have():
  made = learner(restart=False, minibatches=2, epochs=3)
  made.update(TrainingSet(FOREST, ADVANTAGES, own_segments(FOREST)))
  assert int(made.arrays().step) == 6


@pytest.mark.parametrize("strategy", ["chain", "tree"])
def test_the_kl_counts_whole_responses_where_they_are_cut(monkeypatch, strategy):
  forest = chain_forest(np.random.default_rng(0), longest=2, probes=0)
  trained, packed, pack = own_segments(forest), [], packing.pack

  def watched(*args, **kwargs):
    packed.append(pack(*args, **kwargs))
    return packed[-1]

  monkeypatch.setattr(packing, "pack", watched)
  made = learner(rollout__strategy=strategy, rollout__segment_tokens=(2, 2), restart=False)
  made.update(TrainingSet(forest, trained.astype(np.float32), trained))
  (batch, counts), responses = packed[0], np.sum(forest.depth == 1)
  assert responses < counts["segments"] == trained.sum()
  want = responses if strategy == "chain" else counts["segments"]
  np.testing.assert_allclose(batch.episodes.sum(), want, rtol=1e-6)
