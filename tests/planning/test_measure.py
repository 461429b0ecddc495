"""Sizes of compiled programs: their sum, their line over layers, what a refusal says."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.errors import JaxRuntimeError

from spo_jax.infra.topology import GIB
from spo_jax.planning import measure
from spo_jax.planning.collectives import Collective
from spo_jax.planning.programs import Program
from tests.planning.setups import setup_of, sized


def floats(count: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((count,), jnp.float32)


def test_a_chip_holds_what_is_argued_put_out_and_beside():
  program = measure.Measured("step", "update", 1.0, 1000, 700, 600, temporaries=50, beside=7)
  assert program.total == 1000 + 700 - 600 + 50 + 7


def test_sizes_of_a_program():
  """Of 100 and 20 floats, the 100 are written anew where they lie, and 3 are new."""
  step = jax.jit(lambda kept, x: (kept + 1, x[:3]), donate_argnames="kept")
  program = Program("step", "update", lambda: step.lower(floats(100), floats(20)), floats(5))
  found = measure.measure(program)
  assert (found.name, found.phase, found.compiled) == ("step", "update", True)
  assert (found.arguments, found.aliased, found.beside) == (480, 400, 20)
  # A CPU counts the pointers of the outputs too.
  assert 412 <= found.outputs < 480 and found.temporaries < 100 and found.seconds > 0


class Refused:
  """Stands for a lowered program that the compiler refuses."""

  def __init__(self, message):
    self.message = message

  def compile(self):
    raise JaxRuntimeError(self.message)


def test_a_program_refused_for_its_memory_is_measured_by_what_the_compiler_says():
  refused = lambda message: measure.measure(
    Program("step", "update", lambda: Refused(message), beside=())
  )
  found = refused("RESOURCE_EXHAUSTED: Used 20.0G of 15.75G hbm")
  assert found.total == 20 * GIB and not found.compiled
  with pytest.raises(JaxRuntimeError, match="Mosaic failed"):
    refused("Mosaic failed")


def test_what_the_compiler_says_of_memory_is_read():
  read = measure._needed_bytes
  assert read("memory required for HLO temporaries (298.12G) exceeds available") == 298.12 * GIB
  assert read("Used 20.5M of 15.75G hbm") == 20.5 * 2**20
  assert read("Mosaic failed") is None


def test_two_numbers_of_layers_tell_of_the_models_own():
  """Programs whose arguments are 10 floats, and 25 for each layer; a whole one is compiled once."""
  setup = setup_of()
  setup = dataclasses.replace(setup, model=dataclasses.replace(setup.model, layers=7))
  notes, layers = [], []

  def programs(part):
    layers.append(part.model.layers)
    for name in ("decode", "extend"):
      x = floats(10 + 25 * part.model.layers)
      yield Program(name, "sampling", lambda x=x: jax.jit(jnp.sum).lower(x), beside=())

  found = measure.measure_all(setup, programs, (1, 3), notes.append)
  assert [(p.name, p.arguments) for p in found] == [("decode", 740), ("extend", 740)]
  assert layers == [1, 3, 7]  # of the 7 no program is compiled
  assert len(notes) == 4 and notes[0].startswith("compiled sampling/decode, 1 layers")
  (alone,) = measure.measure_all(setup, programs, (), notes.append, only=["sampling/extend"])
  assert (alone.name, alone.arguments) == ("extend", 740)
  assert len(notes) == 5 and notes[4].startswith("compiled sampling/extend, 7 layers")
  whole = lambda part: (dataclasses.replace(p, whole=True) for p in programs(part))
  (alone,) = measure.measure_all(setup, whole, (1, 3), notes.append, only=["sampling/extend"])
  assert alone.arguments == 740 and len(notes) == 6 and "7 layers" in notes[5]


def test_layers_are_extrapolated_along_a_line():
  found = measure._extend_line(sized(30.0), sized(50.0), (2, 4), at=10)
  assert found.total == 110.0 and found.seconds == 2.0 and found.compiled
  assert measure._extend_line(sized(50.0), sized(30.0), (2, 4), at=10).total == 50.0
  refused = sized(50.0, compiled=False)
  assert not measure._extend_line(sized(30.0), refused, (2, 4), at=10).compiled


def test_collectives_are_extrapolated_along_a_line():
  """A gather of each layer, a sum of the whole, and a permute that one layer has no use for."""
  sums = [Collective("all-reduce", 0, 1, 8.0, 8.0)]
  one = [Collective("all-gather", 1, 1, 100.0, 300.0), *sums]
  two = [Collective("all-gather", 1, 2, 200.0, 600.0), Collective("collective-permute", 0, 3, 6, 6)]
  a, b = (dataclasses.replace(sized(1.0), sent=tuple(sent)) for sent in (one, two + sums))
  found = {(c.kind, c.loops): c for c in measure._extend_line(a, b, (1, 2), at=4).sent}
  assert found["all-gather", 1] == Collective("all-gather", 1, 4, 400.0, 1200.0)
  assert found["all-reduce", 0] == sums[0]
  assert found["collective-permute", 0].count == 9
