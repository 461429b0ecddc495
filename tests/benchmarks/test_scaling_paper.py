"""Scaling on paper: identities of its rooflines, what was measured comes out again, and the tables
of the document are those that are printed."""

import dataclasses
import math
import pathlib

import jax
import pytest
from flax import linen as nn

from benchmarks import scaling_paper as paper
from benchmarks import scaling_rooflines as rooflines
from benchmarks.scaling_rooflines import Shares
from configs import spo_tree
from spo_jax.models.decoder import count_params, init_params
from spo_jax.models.families import config_from_hf
from spo_jax.models.known import KNOWN_MODELS
from spo_jax.planning.minimum import step_work

NAME = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
ALL_FSDP = {machine.name: machine for machine in paper.MACHINES}
V5E_16 = ALL_FSDP["v5e-16 (4x4)"]


def with_chips(chips, **fields):
  return dataclasses.replace(V5E_16, chips=chips, fsdp=chips, **fields)


def test_the_experiment_is_that_of_the_config():
  config = spo_tree.get_config("qwen1.5b_math")
  rollout, work = config.rollout, paper.MATH
  assert (rollout.prompts, rollout.slots, config.minibatches) == (32, work.slots, work.updates)
  assert rollout.max_prompt_tokens == work.prompt_tokens and rollout.branches == work.branches
  assert work.segments[:2] == rollout.segment_tokens
  assert sum(work.segments) == rollout.max_response_tokens
  assert config.packing.row_length == work.row_length


def test_a_chip_is_as_slow_as_the_slower_of_its_two():
  chip = paper.V5E
  assert rooflines.on_chip(chip, 197e12, 0.0) == rooflines.on_chip(chip, 0.0, 819e9) == 1.0
  assert rooflines.on_chip(chip, 197e12, 2 * 819e9) == 2.0


def test_a_step_does_what_the_plans_minimum_says():
  """On one chip at a byte, or a FLOP, a second."""
  cfg = config_from_hf(KNOWN_MODELS[NAME], dtype="bfloat16")
  boxed = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
  params = jax.tree.map(place, nn.unbox(boxed))
  assert count_params(params) == pytest.approx(paper.POLICY.parameters, rel=1e-3)
  least = [(part.accessed, part.flops) for part in step_work(cfg, params, 5, 6, 1400, 324).values()]

  def total(**rates):
    chip = dataclasses.replace(paper.V5E, **rates)
    machine = dataclasses.replace(V5E_16, chip=chip, chips=1, fsdp=1)
    return sum(rooflines.step_parts(paper.POLICY, machine, 5, 6, 1400, 324).values())

  accessed, flops = (sum(part) for part in zip(*least, strict=True))
  # Biases, which have an axis of heads, count there as matrices.
  assert total(flops=math.inf, memory_rate=1.0) == pytest.approx(accessed, rel=1e-4)
  assert total(flops=1.0, memory_rate=math.inf) == pytest.approx(flops, rel=1e-4)


def test_a_step_sends_what_was_compiled():
  """Of one layer and of two, compiled for v5e:4x4: a gather of rows for each feed-forward layer and
  one for the logits, a ring of permutes that brings rows back, an all-to-all of the logits, and an
  all-reduce of embeddings, which has 5,760 bytes of something else."""
  one, two = 4_423_680, 6_635_520
  gathered, ring, logits, embeddings = two - one, 15 * 147_456, 27_348_480, 4_429_440
  found = rooflines.step_parts(paper.POLICY, V5E_16, paper.MATH.slots, 6, 1400, 648)["sent"]
  once = one - gathered + logits + embeddings
  compiled = 28 * (gathered + ring) + once
  assert found * paper.V5E.link_rate == pytest.approx(compiled, rel=1e-4)


def test_what_was_measured_comes_out_again():
  shares = paper.measured_shares()
  found = rooflines.phases(paper.POLICY, paper.ONE_H100, paper.MEASURED_WORK, shares)
  assert found["decode"] == pytest.approx(paper.MEASURED_DECODE_S)
  assert found["reference"] == pytest.approx(paper.MEASURED_REFERENCE_S)
  assert found["updates"] == pytest.approx(paper.MEASURED_UPDATES_S, rel=0.01)
  assert paper.MEASURED_WORK.tokens == pytest.approx(659e3, rel=0.01)
  assert all(0 < share < 1 for share in dataclasses.astuple(shares))


def test_twice_the_chips_train_in_half_the_time_as_far_as_rows_go():
  def seconds(chips, rows):
    machine = with_chips(chips)
    work, flops = paper.MATH, rooflines.TRAIN
    return rooflines.pass_seconds(paper.POLICY, machine, work, 1.0, flops, rows)

  assert seconds(16, 64) == pytest.approx(2 * seconds(32, 64))
  assert seconds(16, 17) == seconds(16, 32) and seconds(64, 17) == seconds(32, 17)


def test_links_slow_training_where_they_are_slower_than_the_chips():
  slow = dataclasses.replace(paper.V5E, link_rate=1e9)
  args = (paper.MATH, 1.0, rooflines.TRAIN, 16)
  before = rooflines.pass_seconds(paper.POLICY, V5E_16, *args)
  after = rooflines.pass_seconds(paper.POLICY, with_chips(16, chip=slow), *args)
  sent = paper.POLICY.parameters * (2 * 2 + 4) * 15 / 16
  assert before < after == pytest.approx(sent / 1e9)


def test_no_number_of_chips_takes_fewer_steps_than_a_path_has_tokens():
  work = dataclasses.replace(paper.MATH, slots=10**6)
  assert work.steps == 600 + 600 + 648
  many = with_chips(2**20)
  step = rooflines.step_parts(paper.POLICY, many, 1, 1, 0, 0)
  found = rooflines.decode_seconds(paper.POLICY, many, work, Shares())
  assert found > work.steps * (step["weights"] + step["waits"])


def test_a_smaller_share_of_the_roofline_takes_longer_and_chips_wait_as_before():
  half = Shares(decode=0.5)
  seconds = lambda machine, shares: rooflines.decode_seconds(
    paper.POLICY, machine, paper.MATH, shares
  )
  one = with_chips(1)
  assert seconds(one, half) == pytest.approx(2 * seconds(one, Shares()))
  assert seconds(V5E_16, Shares()) < seconds(V5E_16, half) < 2 * seconds(V5E_16, Shares())


def test_costs_are_hours_times_prices():
  assert paper.dollars(V5E_16, 3600.0) == (16 * 1.2, 16 * 1.2)
  assert paper.dollars(ALL_FSDP["8 x H100"], 1800.0) == (12.0, 44.0)


def test_the_document_has_the_tables(capsys):
  paper.main()
  document = (pathlib.Path(paper.__file__).parents[1] / "docs" / "scaling.md").read_text()
  printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
  assert len(printed) > 20
  missing = [line for line in printed if line not in document.splitlines()]
  assert not missing, f"run python -m benchmarks.scaling_paper again: {missing[0]}"


def test_what_suits_a_machine_is_the_shortest_that_fits():
  shares = paper.measured_shares()
  for machine in paper.MACHINES:
    mesh, work = paper.on_machine(machine, shares)
    held = rooflines.state_bytes(paper.POLICY, mesh)
    weights = rooflines.decode_weights_bytes(paper.POLICY, mesh)
    room = (machine.chip.memory - held - weights) * machine.chips * paper.LIMITS.caches
    groups, n, prefix, budget = work.levels()[-1]
    assert held <= paper.LIMITS.state * machine.chip.memory
    assert work.slots * (2 * prefix + n * budget) * paper.POLICY.token_bytes <= room
    took = sum(rooflines.phases(paper.POLICY, mesh, work, shares).values())
    usual = paper.on_mesh(machine, paper.MATH)
    assert took <= sum(rooflines.phases(paper.POLICY, machine, usual, shares).values())
