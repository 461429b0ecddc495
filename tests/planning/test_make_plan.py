"""A plan of a tiny run: every program is compiled, and the largest sizes that fit are found."""

import dataclasses

import pytest

from spo_jax import plan
from spo_jax.errors import UserError
from spo_jax.infra.topology import open_topology
from spo_jax.models.decoder import count_params
from spo_jax.planning import measure, programs, report
from tests.planning.setups import CONFIG, MODEL, changed, setup_of, sized
from tests.tiny import tiny_params


@pytest.fixture(scope="module")
def planned():
  notes = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, "planned_decoder", lambda config: MODEL)
    found = plan.make_plan(CONFIG, open_topology("cpu:8", 1.0), (), True, notes.append)
  return found, notes


def test_a_plan_measures_every_program(planned):
  found, notes = planned
  names = [f"{p.phase}: {p.name}" for p in found.programs]
  sampling = ["prefill", "decode level 1", "extend level 1", "decode level 2"]
  assert names == (
    ["update: prepare", "update: train_step"]
    + [f"sampling: {name}" for name in sampling]
    + ["evaluation: prefill", "evaluation: decode"]
  )
  assert found.all_fit and "It fits" in report.lines(found)[-1]
  told = [f"compiled {p.phase}/{p.name}, 1 layers: " for p in found.programs]
  assert all(note.startswith(start) for note, start in zip(notes, told, strict=False))


def test_what_lies_beside_a_program_is_the_rest_of_the_state(planned):
  found, _ = planned
  params = count_params(tiny_params(MODEL)) * 4 / 8
  state = found.state()
  assert state["parameters"] == params and state["reference policy"] == params
  moments = pytest.approx(state["moments"], abs=8)  # the optimiser's counts go with them or not
  beside = {p.name: p.beside for p in found.programs}
  assert beside["train_step"] == params
  assert beside["prepare"] - params == moments and beside["extend level 1"] - 2 * params == moments
  assert beside["prefill"] - params == beside["decode level 2"] - params == moments
  step = next(p for p in found.programs if p.name == "train_step")
  assert params + state["moments"] <= step.aliased < step.arguments


def test_a_plan_looks_for_the_largest_sizes(planned):
  """Of the programs that hold most: the train step, and the last and widest level of the tree."""
  found, notes = planned
  searched = {note.split(",")[0] for note in notes[len(found.programs) :]}
  assert searched == {"compiled update/train_step", "compiled sampling/decode level 2"}
  assert [entry.field for entry in found.largest] == ["packing.rows", "rollout.slots"]
  rows, slots = found.largest
  assert rows.value > 8 and rows.value % 8 == 0 and not rows.all_there_is
  assert 0.9 < rows.total / found.topology.chip_bytes <= 1
  assert slots.value == 16 and slots.all_there_is


def test_rows_stay_on_their_device(planned):
  """Where weights are not gathered, every device computes all rows."""
  step = next(p for p in planned[0].programs if p.name == "train_step")
  left = dataclasses.replace(setup_of(), model=MODEL)
  (alone,) = measure.measure_all(left, programs.update_programs, (), print, ["update/train_step"])
  assert step.temporaries < 0.7 * alone.temporaries


def test_chosen_programs_are_compiled_alone(monkeypatch):
  monkeypatch.setattr(plan, "planned_decoder", lambda config: MODEL)
  monkeypatch.setattr(measure, "measure", lambda program: sized(1.0, program.phase, program.name))
  make = lambda *chosen: plan.make_plan(
    CONFIG, open_topology("cpu:8", 1.0), (), False, lambda _: None, chosen=chosen
  )
  found = make("evaluation/decode", "sampling/extend level 1")
  assert [p.path for p in found.programs] == ["sampling/extend level 1", "evaluation/decode"]
  with pytest.raises(UserError, match="no program 'decode', it has: update/prepare, update/train_"):
    make("decode")


def test_nothing_is_compiled_where_the_state_does_not_fit(monkeypatch):
  monkeypatch.setattr(plan, "planned_decoder", lambda config: MODEL)
  found = plan.make_plan(CONFIG, open_topology("cpu:8", 1e-6), (), True, pytest.fail)
  assert not found.programs and not found.all_fit
  assert "the state alone takes" in "\n".join(report.lines(found))


def test_a_batch_that_the_machine_cannot_divide_is_refused(monkeypatch):
  monkeypatch.setattr(plan, "planned_decoder", lambda config: MODEL)
  config = changed(packing={"rows": 12})
  with pytest.raises(UserError, match="config.packing.rows 12 cannot be divided over the mesh"):
    plan.make_plan(config, open_topology("cpu:8", 1.0), (), True, pytest.fail)


def test_attention_that_the_machine_cannot_compute_is_refused(monkeypatch):
  model = dataclasses.replace(MODEL, attention="pallas")
  monkeypatch.setattr(plan, "planned_decoder", lambda config: model)
  with pytest.raises(UserError, match="attention 'pallas' needs a TPU, the device is a cpu"):
    plan.make_plan(CONFIG, open_topology("cpu:8", 1.0), (), True, pytest.fail)


def test_as_many_groups_are_decoded_as_the_last_level_has_parents():
  groups = lambda **rollout: plan.decoded_groups(changed(rollout=rollout))
  assert groups(branches=(2, 3, 4), segment_tokens=(2, 2)) == 8 * 2 * 3
  assert groups(strategy="chain", samples=5) == 8 * 5
  assert groups(strategy="group", samples=5) == 8
  assert groups(strategy="chain", samples=5, parts=4) == 2 * 5
  assert groups(branches=(2, 3, 4), segment_tokens=(2, 2), parts=2) == 4 * 2 * 3


def find(cost, value=16, **more) -> report.Largest:
  now = cost(value)
  return plan.find_largest("packing.rows", cost, now, value, 8, chip_bytes=1000, **more)


def test_the_largest_value_is_the_largest_that_compiles_and_fits():
  assert find(lambda rows: sized(100 + 10 * rows)).value == 88
  assert find(lambda rows: sized(100 + 10 * rows), value=8).value == 88
  assert find(lambda rows: sized(100 + 10 * rows + (rows > 80) * 500)).value == 80
  assert find(lambda rows: sized(100 + 10 * rows, compiled=rows < 80)).value == 72
  assert find(lambda rows: sized(2000.0 + rows)).value == 0
  # None of the guesses 88, 80 and 40 fits: what is left is the largest that was compiled before.
  entry = find(lambda rows: sized(100 + 10 * rows + (rows > 16) * 900))
  assert entry.value == 16 and entry.total == 260


def test_sizes_that_bend_upwards_are_found_on_a_second_line():
  """The line through 8 and 16 leads to 496, but 208 are full; that through 16 and 488, to 200."""
  entry = find(lambda rows: sized(2.0 * rows + max(rows - 32, 0) * 3.3))
  assert entry.value == 200


def test_a_value_above_which_nothing_changes_is_the_largest():
  entry = find(lambda slots: sized(100 + 10 * slots), most=40)
  assert entry.value == 40 and entry.all_there_is and entry.total == 500
  assert find(lambda slots: sized(100), most=40).value == 40
  tried = []
  entry = find(lambda slots: tried.append(slots) or sized(100 + 10 * slots), most=400)
  assert tried == [16, 8, 88] and entry.value == 88 and not entry.all_there_is


def test_nothing_is_compiled_anew_for_a_value_that_is_all_there_is():
  now = sized(100)
  entry = plan.find_largest("rollout.slots", pytest.fail, now, 16, 8, chip_bytes=1000, most=8)
  assert entry.value == 8 and entry.all_there_is and entry.total == 100


def test_layers_that_are_a_loop_are_compiled_whole(monkeypatch):
  """Of 5 layers: updates and `extend` with all of them, the others with 1 and 2."""
  model = dataclasses.replace(MODEL, layers=5, scan_layers=True)
  monkeypatch.setattr(plan, "planned_decoder", lambda config: model)
  monkeypatch.setattr(measure, "measure", lambda program: sized(1.0, program.phase, program.name))
  notes = []
  plan.make_plan(CONFIG, open_topology("cpu:8", 1.0), (1, 2), False, notes.append)
  layers = {}
  for note in notes:
    name, count = note.removeprefix("compiled ").split(" layers")[0].split(", ")
    layers.setdefault(name, []).append(int(count))
  whole = {"update/prepare", "update/train_step", "sampling/extend level 1"}
  assert whole < layers.keys()
  assert all(layers[name] == ([5] if name in whole else [1, 2]) for name in layers)
