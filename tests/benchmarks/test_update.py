"""The benchmarks of the update at tiny sizes: agreement, tables, mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from benchmarks import peer_trainers, peers, plain_update, update
from benchmarks.peer_trainers import EPSILON, TRAINERS
from benchmarks.plain_update import OPTIMIZER, Ours
from spo_jax.infra.compilation import Meter
from spo_jax.models.decoder import forward, init_params
from spo_jax.training.optimizer import make_optimizer
from spo_jax.training.packing import PackConfig
from spo_jax.training.step import new_state

PLAIN = "--plain 4 8 --layers 1 --width 32 --vocab 48 --micro-rows 2 --chunk 8 --repeats 2"


def record(capsys):
  (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
  return json.loads(line)


@pytest.fixture(scope="module")
def model():
  return peers.random_model(1, 32, 48)


@pytest.fixture(scope="module")
def rows():
  return plain_update.plain_rows(4, 8, 48)


def oracle(model, rows, steps):
  """The losses of so many steps, and the parameters after them, without anything of `training`."""
  T = rows.tokens.shape[1]

  def loss_fn(params):
    positions = jnp.broadcast_to(jnp.arange(T), rows.tokens.shape)
    hidden, _ = forward(model.cfg, update.attend_causal, params, rows.tokens, positions)
    logprobs = jax.nn.log_softmax(hidden[:, :-1] @ params["unembedding"])
    taken = jnp.take_along_axis(logprobs, rows.tokens[:, 1:, None], axis=-1)[..., 0]
    ratios = jnp.exp(taken - rows.old_logprobs)
    advantages = rows.advantages[:, None]
    clipped = jnp.clip(ratios, 1 - EPSILON, 1 + EPSILON)
    return -jnp.minimum(advantages * ratios, advantages * clipped).mean()

  optimizer = make_optimizer(OPTIMIZER)

  @jax.jit
  def step(params, state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  params, state, losses = model.params, optimizer.init(model.params), []
  for _ in range(steps):
    params, state, loss = step(params, state)
    losses.append(float(loss))
  return losses, params


def test_our_step_is_that_of_a_plain_loss(model, rows):
  engine = Ours(model, rows, PackConfig(8, 2, 8, 8), 8, "blocks")
  losses, params = oracle(model, rows, 2)
  found = [engine(0)]
  meter = Meter()
  found.append(engine(1))
  assert not meter.read()["time/programs"]
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  for ours, theirs in zip(jax.tree.leaves(engine.params), jax.tree.leaves(params), strict=True):
    # Adam's first steps have the size of the learning rate.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.01 * OPTIMIZER.learning_rate)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_peer_has_our_losses(model, rows, name):
  if gone := peers.missing(name):
    pytest.skip(f"{', '.join(gone)} is not installed")
  (engine,) = peers.load(TRAINERS, [name], model, rows, OPTIMIZER).values()
  ours = Ours(model, rows, PackConfig(8, 2, 8, 8), 8, "blocks")
  losses = {"ours": [ours(turn) for turn in range(2)], name: [engine(turn) for turn in range(2)]}
  assert plain_update.check_agreement(losses) < 1e-4


def test_losses_that_differ_are_told():
  with pytest.raises(AssertionError, match="loss of hf in step 2"):
    plain_update.check_agreement({"ours": [1.0, 2.0, 3.0], "hf": [1.0, 2.1, 3.0]})
  later = {"ours": [1.0, 2.0, 3.0], "hf": [1.00001, 2.0, 9.0]}
  assert plain_update.check_agreement(later) == pytest.approx(1e-5)


def test_plain_rows_make_a_table_and_a_record(capsys, monkeypatch):
  monkeypatch.setattr(plain_update, "PAUSE_S", 0.0)
  monkeypatch.setattr(peers.HuggingFace, "needs", ("no_such_package",))
  assert update.main([*PLAIN.split(), "--peers", "hf"]) == 0
  printed = capsys.readouterr()
  assert "hf is left out: no_such_package is not installed" in printed.err
  *table, line = printed.out.splitlines()
  assert table[-1].split()[0] == "ours" and table[-1].split()[-1] == "1.00"
  (engine,) = json.loads(line)["engines"].values()
  assert len(engine["seconds"]) == 2 and len(engine["losses"]) == 3
  assert engine["losses"][0] > engine["losses"][-1]


def test_the_forms_of_a_tree_agree_and_tell_their_memory(capsys):
  words = "--branches 2 2 --segment 6 --layers 1 --width 64 --vocab 48 --micro-batch 64"
  words += " --query-block 16 --repeats 1 --attention blocks"
  assert update.main(words.split()) == 0
  found = record(capsys)
  forms = {"blocks", "rows", "ordinary rows"}
  assert set(found["peak_mib"]) == set(found["temporary_mib"]) == forms
  assert all(found["peak_mib"][name] > mib for name, mib in found["temporary_mib"].items())
  on_rows = 2 * 7 + 4 * 13
  assert found["tokens"] == {"blocks": 48, "rows": on_rows, "ordinary rows": on_rows}
  assert set(found["ratio"]) == {"rows / blocks", "ordinary rows / blocks"}
  assert found["gradient_error"] < 1e-5


@pytest.mark.parametrize("form", update.ROWS)
def test_ordinary_rows_have_gradients_of_jax_and_logits_of_whole_rows(form):
  words = "--branches 2 --segment 6 --layers 1 --width 64 --vocab 48"
  cfg, loss_cfg = update.configs(update.parse_args(words.split()))
  # Rows of 7 tokens, of which 4 are the segment.
  rows = update.segment_rows(update.full_tree([2], 4, 3, 48), np.ones(3, np.float32), 64)
  params = nn.unbox(jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0)))
  state = jax.eval_shape(lambda params: new_state(params, update.OPTIMIZER), params)
  ordinary = update.ROWS[form]
  jaxpr = str(update.rows_step.trace(cfg, loss_cfg, ordinary, state, rows).jaxpr)
  assert ("name=_product" in jaxpr) != ordinary
  assert [f"f32[2,{n},48]" in jaxpr for n in (4, 6)] == [not ordinary, ordinary]


def test_wrong_sizes_are_told(capsys):
  assert update.main([*PLAIN.split(), "--peers", "--width", "34"]) == 2
  assert "--width 34" in capsys.readouterr().err
  for words, told in (
    ("--plain 6 8 --micro-rows 4", "6 rows are no multiple of --micro-rows 4"),
    ("--plain 4 10 --block 4", "10 tokens"),
    ("--plain 4 1", "1 tokens"),
    ("--plain 4 8 --branches 2", "--branches"),
    ("--peers hf", "--peers"),
  ):
    with pytest.raises(SystemExit):
      update.main(words.split())
    assert told in capsys.readouterr().err


def test_trainers_need_what_their_samplers_need():
  assert TRAINERS.keys() == peers.PEERS.keys()
  for name, trainer in TRAINERS.items():
    assert trainer.needs == peers.PEERS[name].needs
  assert peer_trainers.one_device_mesh().size == 1
