"""Collectives read from HLO: what is counted, how often, and how many bytes a chip receives."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.infra.mesh import make_mesh
from spo_jax.planning.collectives import Collective, collectives

# Written by hand, in the notation of the compiler for TPUs.
TEXT = (pathlib.Path(__file__).parent / "collectives.hlo").read_text()


def test_collectives_of_a_text():
  """Asynchronous ones count once; a group is what the program says, else all 8 chips."""
  found = {(one.kind, one.loops): one for one in collectives(TEXT)}
  gathered = (128 * 4 + 8 * 2 * 2) / 2  # of a pair of chips, the other's half
  reduced = 2 * 3 / 4  # a byte among four chips
  assert found == {
    (one.kind, one.loops): one
    for one in (
      Collective("all-gather", 0, 1, gathered, gathered),
      Collective("reduce-scatter", 0, 1, 7 * 8 * 4, 7 * 8 * 4),
      Collective("all-reduce", 1, 1, reduced, reduced),
      Collective("collective-permute", 2, 1, 32.0, 28 * 32.0),
    )
  }


@pytest.mark.parametrize(
  ("groups", "chips"),
  [
    ("{}", 8),
    ("{{0,1,2,3},{4,5,6,7}}", 4),
    ("[4,2]<=[8]", 2),
    ("[2,4]<=[4,2]T(1,0)", 4),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
    ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_1'}", 8),
    ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
  ],
)
def test_groups_in_all_their_notations(groups, chips):
  text = f"""\
HloModule jit_f, num_partitions=8

ENTRY %main (a: f32[10]) -> f32[10] {{
  %a = f32[10]{{0}} parameter(0)
  ROOT %g = f32[10]{{0}} all-gather(%a), channel_id=1, replica_groups={groups}, dimensions={{0}}
}}
"""
  (one,) = collectives(text)
  assert one.received == 40 * (chips - 1) / chips


def test_the_most_bytes_come_first():
  sizes = [one.received_in_stated_turns for one in collectives(TEXT)]
  assert sizes == sorted(sizes, reverse=True)


def compiled_text(function, *shapes, specs, out) -> str:
  mesh = make_mesh(1, 8, 1)
  place = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))
  arrays = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(spec))
    for shape, spec in zip(shapes, specs, strict=True)
  ]
  return jax.jit(function, out_shardings=place(out)).lower(*arrays).compile().as_text()


def test_a_gather_of_a_compiled_program():
  text = compiled_text(lambda x: x + 1, (16, 4), specs=[("fsdp",)], out=())
  (one,) = collectives(text)
  assert (one.kind, one.loops, one.count) == ("all-gather", 0, 1)
  assert one.received == 7 * 2 * 4 * 4


@pytest.mark.parametrize("turns", [3, 5])
def test_a_sum_in_a_compiled_loop(turns):
  """Of 8 parts of a product, with 16 rows of 4 numbers, in each turn."""

  def run(x, w):
    step = lambda carry, _: (jnp.tanh(carry @ w), None)
    return jax.lax.scan(step, x, length=turns)[0]

  text = compiled_text(run, (16, 8), (8, 8), specs=[(None, "fsdp"), ("fsdp",)], out=(None, "fsdp"))
  found = [one for one in collectives(text) if one.loops]
  assert found and all(one.loops == 1 and one.count >= 1 for one in found)
  assert all(one.received_in_stated_turns == turns * one.received for one in found)


def test_one_chip_sends_nothing():
  text = jax.jit(jnp.sum).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile().as_text()
  assert collectives(text) == []
