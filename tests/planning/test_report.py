"""What a plan says: whether each program fits, what is free, what to change; parameters by kind."""

import dataclasses

from spo_jax.infra.topology import GIB, Topology
from spo_jax.planning import report
from spo_jax.planning.collectives import Collective
from tests.planning.setups import setup_of, sized

STEP = sized(2 * GIB)
DECODE = sized(3 * GIB, "sampling", "decode")
SCORE = sized(1 * GIB, "evaluation", "decode")


def plan_of(programs, chip_bytes, largest=()) -> report.Plan:
  setup = setup_of(data=2, fsdp=4)
  topology = Topology("cpu:8", list(setup.mesh.devices.flat), int(chip_bytes))
  return report.Plan(setup, topology, (), programs, largest)


def lines_of(programs, chip_bytes, largest=()) -> list[str]:
  return report.lines(plan_of(programs, chip_bytes, largest))


def test_a_program_fits_if_it_compiles_and_takes_no_more_than_a_chip_has():
  plan = plan_of([STEP, DECODE], 3 * GIB)
  assert plan.fits(DECODE) and plan.all_fit
  assert not plan.fits(sized(3 * GIB + 1))
  assert not plan.fits(sized(1 * GIB, compiled=False))
  assert not plan_of([STEP, DECODE], 3 * GIB - 1).all_fit


def test_what_fits_is_told_with_what_is_free_during_the_largest_program():
  text = lines_of([STEP, DECODE, SCORE], 3.5 * GIB)
  assert text[-1] == "It fits: 0.50 GiB a chip are free during sampling: decode."
  assert "cpu:8: 8 chips of 3.50 GiB, mesh data 2 x fsdp 4 x sequence 1 x tensor 1" in text
  assert not any("does not fit" in line for line in text)


def test_what_does_not_fit_is_told_with_what_to_change():
  text = lines_of([STEP, DECODE, SCORE], 1.6 * GIB)
  told = [line.split()[:2] for line in text if line.endswith("does not fit")]
  assert told == [["update:", "train_step"], ["sampling:", "decode"]]
  assert told[0] and any("2.00     125%" in line for line in text)
  verdict = text[text.index("It does not fit. What would help:") :]
  assert [line.split(":")[0].strip() for line in verdict[1:]] == ["update", "sampling", "all of it"]
  assert "fewer config.packing.rows (at least 8, one a chip)" in verdict[1]
  assert "fewer config.rollout.slots" in verdict[2] and "more chips" in verdict[3]


def test_a_state_that_does_not_fit_is_told():
  """Sizes below a GiB are in MiB."""
  plan = plan_of([STEP, DECODE, SCORE], 2**10)
  text = report.lines(plan)
  state = sum(plan.state().values()) / 2**20
  assert not plan.state_fits and 0.005 < state < 1
  start = text.index("It does not fit. What would help:")
  assert text[start + 1] == f"  the state alone takes {state:.2f} MiB a chip"
  assert "evaluation: a smaller config.eval.batch" in text[start + 4]
  assert not plan_of([], 2**10).all_fit


def test_the_state_counts_the_reference_policy_where_there_is_one():
  plan = plan_of([], GIB)
  state = plan.state()
  assert 0 < state["reference policy"] == state["parameters"]
  assert 2 * state["parameters"] <= state["moments"] < 2.1 * state["parameters"]
  total = sum(state.values())
  assert plan_of([], total).state_fits and not plan_of([], total - 1).state_fits
  without = dataclasses.replace(plan, setup=setup_of(data=2, fsdp=4, loss={"kl_coef": 0.0}))
  assert without.state() == state | {"reference policy": 0}


def test_the_largest_values_are_told():
  largest = [
    report.Largest("packing.rows", 24, 1.25 * GIB, all_there_is=False),
    report.Largest("rollout.slots", 16, 0.5 * GIB, all_there_is=True),
    report.Largest("rollout.slots", 0, 0.0, all_there_is=False),
  ]
  text = lines_of([STEP], 2 * GIB, largest)
  assert [line.removeprefix("largest config.") for line in text if line.startswith("largest")] == [
    "packing.rows that fits: 24 (1.25 GiB)",
    "rollout.slots that fits: 16 (0.50 GiB), which is all there is",
    "rollout.slots that fits: none",
  ]


def test_sizes_on_a_line_are_said_to_be():
  plan = plan_of([STEP], 3 * GIB)
  assert report.as_json(plan)["layers_compiled"] == [1]
  plan = dataclasses.replace(plan, layers=(2, 4))
  assert report.as_json(plan)["layers_compiled"] == [2, 4]
  line = "sizes are on the line through compilations with 2 and 4 layers"
  assert line + ", but for extend, compiled with all" in report.lines(plan)
  scanned = dataclasses.replace(plan.setup.model, scan_layers=True)
  plan = dataclasses.replace(plan, setup=dataclasses.replace(plan.setup, model=scanned))
  assert line + ", but for updates and extend, compiled with all" in report.lines(plan)


def test_parameters_are_grouped_over_layers():
  setup = setup_of()
  setup = dataclasses.replace(setup, model=dataclasses.replace(setup.model, layers=3))
  kinds = {kind["name"]: kind for kind in report.parameters(setup)}
  gate = {"count": 3, "shape": [16, 24], "split": ["fsdp", "-"], "on_a_chip": [2, 24]}
  assert kinds["block_*/gate"] == gate | {"name": "block_*/gate"}
  assert kinds["embedding"]["count"] == 1


def test_collectives_are_told_by_program():
  sent = (
    Collective("all-gather", 2, 6, 3 * 2**20, 84 * 2**20),
    Collective("all-reduce", 0, 1, 8, 8),
  )
  plan = plan_of([dataclasses.replace(STEP, sent=sent), DECODE], 3 * GIB)
  text = report.lines(plan)
  start = next(i for i, line in enumerate(text) if line.startswith("collectives"))
  cells = [line.split() for line in text[start + 1 : start + 3]]
  assert cells[0][2:] == ["all-gather", "a", "loop", "in", "a", "loop", "6", "3", "84"]
  assert cells[1][2:5] == ["all-reduce", "the", "program"]
  assert report.as_json(plan)["programs"][0]["sent"][0]["received"] == 3 * 2**20
