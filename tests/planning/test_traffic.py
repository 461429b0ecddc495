"""Bytes that a program moves, read from HLO: what is counted, and that parts count as parts."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from spo_jax.planning.traffic import traffic

# Written by hand, in the notation of the compiler for TPUs; the entry has a line to fill in.
TEXT = (pathlib.Path(__file__).parent / "traffic.hlo").read_text()
LOOP = 2 * 400  # the turn of the loop reads 100 floats, and writes them


def moved(*lines: str) -> float:
  """Bytes that these lines of the entry move."""
  found = traffic(TEXT.replace("BODY", "\n".join(f"  {line}" for line in lines)))
  assert found.pop(1) == LOOP
  return found.pop(0)


def test_a_loop_counts_once():
  assert traffic(TEXT.replace("BODY\n", "")) == {0: 0, 1: LOOP}


def test_what_lies_near_the_units_does_not_count():
  assert moved("%x = f32[100]{0:T(128)} negate(%a)") == 800
  assert moved("%x = f32[100]{0:T(128)S(1)} negate(%a)") == 400
  near = "%x = f32[100]{0:T(128)S(1)} negate(%a)"
  assert moved(near, "%y = f32[100]{0:T(128)S(1)} negate(%x)") == 400
  assert moved("%x = f32[100]{0:T(128)} bitcast(%a)") == 0


@pytest.mark.parametrize(
  ("line", "bytes_"),
  [
    # Both ends of a copy that starts; what is done has been counted.
    (
      "%c = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%a)\n"
      "  %d = f32[100]{0:T(128)S(1)} copy-done(%c)",
      400,
    ),
    ("%c = (f32[100]{0:T(128)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%a)", 800),
    # Of a table, the rows that are fetched.
    (
      "%c = ((f32[50,8]{1,0:T(8,128)}), f32[5,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
      "slice-start(%table), slice={[0:5], [0:8]}",
      5 * 32,
    ),
    ("%c = f32[1,8]{1,0:T(8,128)} dynamic-slice(%table, %i, %i)", 2 * 32),
    # Started gathers name what they gather first; those of two chips read 8 floats, write 16.
    (
      "%c = (f32[8]{0:T(128)}, f32[16]{0:T(128)}) all-gather-start(%b), dimensions={0}",
      32 + 64,
    ),
    ('%c = f32[100]{0:T(128)} custom-call(), custom_call_target="AllocateBuffer"', 0),
    ('%c = f32[100]{0:T(128)} custom-call(%a), custom_call_target="tpu_custom_call"', 800),
  ],
  ids=["copy", "copy in memory", "slice-start", "dynamic-slice", "gather", "buffer", "kernel"],
)
def test_lines(line, bytes_):
  assert moved(line) == bytes_


def test_an_update_in_place_costs_the_update():
  line = "%c = f32[50,8]{1,0:T(8,128)} dynamic-update-slice(%table, %row, %i, %i)"
  row = "%row = f32[1,8]{1,0:T(8,128)SPACE} bitcast(%b)"
  assert moved(row.replace("SPACE", "S(1)"), line) == 32
  assert moved(row.replace("SPACE", ""), line) == 2 * 32
  fused = "%c = f32[50,8]{1,0:T(8,128)} fusion(%table, %b, %i), kind=kLoop, calls=%put"
  assert moved(fused) == 2 * 32
  assert moved(fused.replace("T(8,128)}", "T(8,128)S(1)}")) == 32


def test_a_fusion_reads_what_it_uses():
  assert moved("%c = f32[100]{0:T(128)} fusion(%a, %near), kind=kLoop, calls=%scaled") == 800
  two = "%c = (f32[8]{0:T(128)S(1)}, f32[10]{0:T(128)}) fusion(%table, %i, %a), kind=kLoop, "
  # A row of 8 and twice 10 floats are read; of the results the second is written to memory.
  assert moved(two + "calls=%row") == 32 + 2 * 40 + 40


def test_a_fusion_in_a_fusion_passes_all_on():
  summed = "%c = f32[10]{0:T(128)S(1)} fusion(%a), kind=kOutput, calls=%summed"
  assert moved(summed) == 400


def test_a_compiled_product_reads_both_and_writes_one():
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 64), (64, 32))]
  text = jax.jit(lambda x, w: x @ w).lower(*arrays).compile().as_text()
  assert sum(traffic(text).values()) == 4 * (16 * 64 + 64 * 32 + 16 * 32)


def test_a_compiled_loop_updates_in_place():
  """Of a table of 500 rows a turn reads and writes one, and not the others."""

  def run(table):
    step = lambda i, table: table.at[i].multiply(2.0)
    return jax.lax.fori_loop(0, 7, step, table)

  table = jax.ShapeDtypeStruct((500, 64), jnp.float32)
  text = jax.jit(run, donate_argnums=0).lower(table).compile().as_text()
  assert 2 * 256 <= traffic(text)[1] < 10 * 256
