"""The least that programs must do, by hand, and what a compiler counts of the same."""

import dataclasses

import pytest

from spo_jax import plan
from spo_jax.infra.topology import Topology, open_topology
from spo_jax.models.decoder import LayerKind
from spo_jax.planning import measure, minimum, programs, report
from spo_jax.planning.programs import Setup
from tests.planning.setups import CONFIG, MODEL, setup_of, sized

# Of the block, 16 wide: queries and out 16 x 4 x 8, keys and values 16 x 2 x 8, and 3 of 16 x 24.
BLOCK = 2 * 512 + 2 * 256 + 3 * 384


def with_model(setup: Setup, **fields) -> Setup:
  return dataclasses.replace(setup, model=dataclasses.replace(setup.model, **fields))


def test_the_least_bytes_of_a_decode_step():
  """On 8 chips, level 2 of the tree: of 8 slots 1 group a chip, that has a prefix of 6 + 4 tokens
  and 2 continuations of 6. A token has keys and values of 2 heads of 8 numbers of 4 bytes."""
  weights = 4 * (BLOCK + 16 * 32) / 8
  token = 2 * 2 * 8 * 4
  assert minimum.decode_minimum(setup_of()) == weights + token * (10 + 2 * 6)
  assert minimum.decode_minimum(setup_of(rollout={"slots": 16})) == weights + token * 2 * 22


def test_the_least_bytes_follow_dtype_embedding_and_window():
  tied = with_model(setup_of(), tie_embeddings=True, dtype="bfloat16")
  assert minimum.decode_minimum(tied) == 2 * (BLOCK + 16 * 32) / 8 + 64 * 22
  kind = MODEL.layer_kinds[0]
  hidden = lambda window: minimum.decode_minimum(
    with_model(setup_of(), layer_kinds=(LayerKind(kind.rope, window),))
  )
  weights = 4 * (BLOCK + 16 * 32) / 8
  assert hidden(8) == weights + 128 * (2 + 2 * 6)
  assert hidden(5) == weights + 128 * (0 + 2 * 5)


def test_the_least_flops_of_a_layer():
  assert minimum.train_minimum(setup_of()) == 6 * BLOCK
  assert minimum.train_minimum(with_model(setup_of(), remat="blocks")) == 8 * BLOCK
  assert minimum.train_minimum(with_model(setup_of(), remat="dots")) == 6 * BLOCK


def test_a_layers_cost_is_the_difference_of_two_compilations():
  two, four = (
    dataclasses.replace(sized(1.0), flops=flops, moved=moved)
    for flops, moved in ((100.0, 1000.0), (160.0, 1400.0))
  )
  line = measure._extend_line(two, four, (2, 4), at=10)
  assert (line.layer_flops, line.layer_moved) == (30.0, 200.0)
  assert (line.flops, line.moved) == (340.0, 2600.0)
  assert (
    measure._extend_line(two, dataclasses.replace(four, compiled=False), (2, 4), 10).layer_flops
    is None
  )


def test_costs_are_per_packed_token_of_all_chips():
  """A micro-batch of 8 rows of 32 tokens, a row a chip."""
  train = dataclasses.replace(sized(1.0), layer_flops=32.0 * 17000, layer_moved=32.0 * 50)
  step = dataclasses.replace(sized(1.0), moved_in_loops=3 * minimum.decode_minimum(setup_of()))
  decode, flops, moved = minimum.costs(setup_of(), step, train)
  assert decode.ratio == 3 and flops.found == 17000 and moved.found == 50
  assert flops.ratio == 17000 / (6 * BLOCK) and moved.ratio is None
  assert minimum.costs(setup_of(), dataclasses.replace(step, compiled=False), sized(1.0)) == []


INT8 = {"weights": "int8", "cache": "int8"}


def test_the_least_bytes_of_int8():
  """A number is a byte; a key or a value has a scale of 4 bytes too."""
  weights, token = (BLOCK + 16 * 32) / 8, 2 * 2 * (8 + 4)
  assert minimum.decode_minimum(setup_of(rollout=INT8)) == weights + token * (10 + 2 * 6)


@pytest.mark.parametrize("rollout", [{}, {"slots": 16} | INT8], ids=["ring", "chunks of int8"])
def test_a_decode_step_is_counted_at_least_its_minimum(rollout):
  setup = setup_of(rollout=rollout)
  step = measure.measure(programs.decode_step(setup))
  assert step.name == "decode step" and step.aliased > 0
  assert 1 < step.moved_in_loops / minimum.decode_minimum(setup) < 40


def test_a_layers_products_are_counted_as_the_least_says():
  """Attention, norms and activations come on top of the matrices."""
  setup = setup_of()
  compile_ = lambda kind, only: measure.measure_all(setup, kind, (1, 2), print, only)
  (train,) = compile_(programs.update_programs, ["update/train_step"])
  (step,) = compile_(lambda setup: iter([programs.decode_step(setup)]), ())
  found = minimum.costs(setup, step, train)
  assert 1 < found[1].ratio < 2 and found[2].found > 0
  topology = Topology("cpu:8", list(setup.mesh.devices.flat), 2**30)
  told = report.Plan(setup, topology, (1, 2), [train], [], found)
  text = "\n".join(report.lines(told))
  assert "decode step, a chip at a full suffix" in text and f"{found[1].ratio:.2f}" in text
  assert [cost["ratio"] for cost in report.as_json(told)["costs"]] == [
    found[0].ratio,
    found[1].ratio,
    None,
  ]


def test_a_plan_has_costs_where_they_are_asked_for(monkeypatch):
  def pretend(setup, kind, layers, note, only=()):
    names = [program.name for program in kind(setup)]
    measured = dataclasses.replace(sized(1.0), moved_in_loops=5.0, layer_flops=1.0, layer_moved=1.0)
    return [dataclasses.replace(measured, name=name) for name in names]

  monkeypatch.setattr(plan, "planned_decoder", lambda config: MODEL)
  monkeypatch.setattr(plan, "measure_all", pretend)
  make = lambda *more: plan.make_plan(
    CONFIG, open_topology("cpu:8", 1.0), (1, 2), False, print, *more
  )
  assert make().costs == []
  assert [cost.unit for cost in make(True).costs] == ["bytes", "FLOPs", "bytes"]
