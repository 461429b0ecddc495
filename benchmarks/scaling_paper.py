"""Scaling on paper: what the paper's MATH experiment would take on pods that nobody here has.

  python -m benchmarks.scaling_paper

prints the tables of docs/scaling.md. Nothing is measured: rooflines of `scaling_rooflines.py`, with
published peaks, and once more divided by the shares of them that one H100 reached. Every number
that goes in stands here, with its source.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from benchmarks.scaling_rooflines import (
  Chip,
  Limits,
  Machine,
  Policy,
  Shares,
  Work,
  decode_seconds,
  most_slots,
  phases,
  reference_seconds,
  step_parts,
  suited,
  update_seconds,
)
from spo_jax.models.families import config_from_hf
from spo_jax.models.known import KNOWN_MODELS

GIB = 2**30
POLICY = Policy(config_from_hf(KNOWN_MODELS["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]))
# Tokens of packed rows for a token of the trees, by the rows' length; the longest that one v5e chip
# trains: benchmarks/RESULTS.md, "Plans of the paper's experiments".
PACKED = {2048: 2.68, 4096: 1.49, 8192: 1.19, 16384: 1.14}
# configs/spo_tree.py:qwen1.5b_math. No response ends early, all advantages are trained: the most
# that an iteration can be.
MATH = Work(
  prompts=32,
  prompt_tokens=200,
  branches=(6, 6, 6),
  segments=(600, 600, 648),
  updates=4,
  slots=128,
  row_length=16384,
  row_tokens=PACKED[16384],
)
ITERATIONS = 1000
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)  # of the table of v5e chips
# One H100 trained with 0.36 of its memory for the state. A v5e chip's train_step takes 9.6 GiB with
# a 16th of the state (benchmarks/RESULTS.md), and would not fit with a fourth, 0.42 of the chip.
LIMITS = Limits(state=0.375, caches=0.5)

# Peaks: cloud.google.com/tpu/docs/v5e and v5p; NVIDIA's data sheet of the H100 SXM, without
# sparsity, NVLink in one direction. Memory of TPUs is what the compiler gives to programs
# (infra/topology.py). Prices: list, on demand, a chip and hour, in the cheapest region of the US,
# November 2026; they change, and many sell H100s. Assumed: a hop of the TPUs' network takes
# 1 us, a small collective of GPUs behind a switch 10 us.
V5E = Chip(197e12, 819e9, 1600e9 / 8, 15.75 * GIB, 1e-6, 2, (1.20, 1.20))
V5P = Chip(459e12, 2765e9, 4800e9 / 8, 95.74 * GIB, 1e-6, 3, (4.20, 4.20))
H100 = Chip(989e12, 3.35e12, 450e9, 80e9, 10e-6, 0, (3.00, 11.00))
# All on `fsdp`, as the config has it.
MACHINES = (
  Machine("v5e-16 (4x4)", V5E, 16, 16),
  Machine("v5e-256 (16x16)", V5E, 256, 256),
  Machine("v5p, 64 chips (4x4x4)", V5P, 64, 64),
  Machine("8 x H100", H100, 8, 8),
)

# benchmarks/RESULTS.md, "On one H100": 4 of the 32 prompts, rows of 2048 tokens, all continuations
# of a level at once.
ONE_H100 = Machine("one H100", H100, 1, 1)
MEASURED_WORK = dataclasses.replace(
  MATH, prompts=4, slots=144, row_length=2048, row_tokens=1.75e6 / 659e3
)
MEASURED_DECODE_S = 3.8 + 7.3 + 32
MEASURED_REFERENCE_S = 18
MEASURED_UPDATES_S = 73


def measured_shares() -> Shares:
  """Of its rooflines that the H100 reached."""
  none = Shares()
  return Shares(
    decode=decode_seconds(POLICY, ONE_H100, MEASURED_WORK, none) / MEASURED_DECODE_S,
    forward=reference_seconds(POLICY, ONE_H100, MEASURED_WORK, none) / MEASURED_REFERENCE_S,
    train=update_seconds(POLICY, ONE_H100, MEASURED_WORK, none) / MEASURED_UPDATES_S,
  )


def on_machine(machine: Machine, shares: Shares) -> tuple[Machine, Work]:
  """The mesh, slots and rows that suit a machine."""
  return suited(POLICY, machine, MATH, shares, LIMITS, PACKED)


def on_mesh(mesh: Machine, work: Work) -> Work:
  """The work with as many slots as a mesh has room for."""
  return dataclasses.replace(work, slots=most_slots(POLICY, mesh, work, LIMITS.caches))


def mesh_text(mesh: Machine) -> str:
  """Its axes."""
  return f"{mesh.chips // mesh.fsdp} x {mesh.fsdp}"


def dollars(machine: Machine, seconds: float) -> tuple[float, float]:
  """Least and most, of so many seconds on all chips."""
  low, high = (machine.chips * price * seconds / 3600 for price in machine.chip.prices)
  return low, high


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
  """Markdown."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def work_rows() -> Iterator[Sequence[str]]:
  """The iteration, by level of its trees."""
  for level, (groups, n, prefix, budget) in enumerate(MATH.levels(), 1):
    cells = (level, groups, groups * n, prefix, budget, -(-groups // MATH.slots) * budget)
    yield [*map(str, cells), f"{groups * n * budget / 1e6:.2f} M"]


def iteration_rows(shares: Shares) -> Iterator[Sequence[str]]:
  """An iteration on each machine."""
  for machine in MACHINES:
    mesh, work = on_machine(machine, shares)
    times = phases(POLICY, mesh, work, shares)
    total = sum(times.values())
    low, high = dollars(machine, ITERATIONS * total)
    yield [
      machine.name,
      mesh_text(mesh),
      str(work.slots),
      str(work.row_length),
      *(f"{value:.2f} ({value / total:.0%})" for value in times.values()),
      f"{total:.1f}",
      f"{work.sampled / total:,.0f}",
      f"{ITERATIONS * total / 3600:.1f}",
      f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}",
    ]


def step_rows() -> Iterator[Sequence[str]]:
  """A decode step of the last level at half of its suffix, all chips on `fsdp` or in the mesh that
  suits."""
  for machine in MACHINES:
    mesh, work = on_machine(machine, Shares())
    groups, n, prefix, budget = work.levels()[-1]
    at_once = -(-groups // -(-groups // work.slots))
    for either in dict.fromkeys((machine, mesh)):
      parts = step_parts(POLICY, either, at_once, n, prefix, budget / 2)
      yield [
        machine.name,
        mesh_text(either),
        str(-(-at_once // machine.chips) * n),
        *(f"{1e3 * value:.2f}" for value in parts.values()),
        f"{1e3 * sum(parts.values()):.2f}",
      ]


def size_rows(shares: Shares) -> Iterator[Sequence[str]]:
  """Numbers of v5e chips for the same work."""
  for chips in SIZES:
    config = Machine("", V5E, chips, chips)
    mesh, work = on_machine(config, shares)
    times = phases(POLICY, mesh, work, shares)
    total = sum(times.values())
    alone = step_parts(POLICY, mesh, 1, 1, 0, 0)
    floor = work.steps * (alone["weights"] / shares.decode + alone["waits"])
    yield [
      str(chips),
      mesh_text(mesh),
      str(work.slots),
      str(work.steps),
      str(work.row_length),
      f"{times['decode']:.1f}",
      f"{floor:.1f}",
      f"{decode_seconds(POLICY, config, on_mesh(config, work), shares):.1f}",
      f"{times['reference'] + times['updates']:.1f}",
      f"{total:.1f}",
      f"{work.sampled / total / chips:,.0f}",
      f"{dollars(mesh, ITERATIONS * total)[0]:,.0f}",
    ]


def main() -> None:
  """Prints the tables."""
  shares, ideal = measured_shares(), Shares()
  print("## The work\n")
  head = ["level", "groups", "continuations", "prefix", "tokens of each"]
  print(table([*head, f"steps, {MATH.slots} groups at a time", "tokens"], work_rows()))
  print(f"\n{MATH.sampled:,} tokens drawn, which see {MATH.mean_context:,.0f} on the mean.")
  reached = dataclasses.asdict(shares).items()
  print("Shares of the roofline on one H100:", ", ".join(f"{k} {v:.3f}" for k, v in reached))
  head = [
    "machine",
    "data x fsdp",
    "slots",
    "row",
    "prefill, s",
    "decode, s",
    "reference, s",
    "updates, s",
  ]
  head += ["iteration, s", "sampled tokens/s", "hours of 1000", "dollars of 1000"]
  for title, used in (("At the rooflines", ideal), ("At the shares that one H100 reached", shares)):
    print(f"\n## {title}\n\n{table(head, iteration_rows(used))}")
  head = ["machine", "data x fsdp", "continuations of a chip", "weights, ms", "prefix", "suffix"]
  head += ["logits", "sent", "waits", "step, ms"]
  print(f"\n## A step of the last level, at its roofline\n\n{table(head, step_rows())}")
  head = ["v5e chips", "data x fsdp", "slots", "steps", "row", "decode, s", "of it for any work, s"]
  head += ["decode with all on fsdp, s", "reference and updates, s", "iteration, s"]
  head += ["sampled tokens/s and chip", "dollars of 1000"]
  print(f"\n## More chips, the same work\n\n{table(head, size_rows(shares))}")


if __name__ == "__main__":
  main()
