"""The stages of a comparison. What has been done is read from the folder, so any call goes on."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.comparison.budgets import Pace, pace, write_calibration
from benchmarks.comparison.figures import figures, final_accuracy
from benchmarks.comparison.methods import Method
from benchmarks.comparison.plan import Plan
from benchmarks.comparison.rates import Scores, best, beyond, read_rates
from benchmarks.comparison.runs import Maker, Run
from spo_jax.infra.metrics import read_metrics

STAGES = ("warm_start", "calibration", "sweep", "test", "tables")
CALIBRATION_FILE = "calibration.json"
RATES_FILE = "rates.json"
PACED = ("tokens", "seconds")  # arms whose lengths a calibration tells


class Cell(NamedTuple):
  """A method in an arm of a task."""

  task: str
  arm: str
  method: Method


@dataclasses.dataclass
class Comparison:
  """A plan, and what has been found out for it.

  Attributes:
    plan: what is compared.
    maker: of the runs.
    paces: of the calibration, by task and method.
    given_rates: by task, arm and method, which spare their sweeps.
  """

  plan: Plan
  maker: Maker
  paces: dict[str, dict[str, Pace]]
  given_rates: Mapping[str, Mapping[str, Mapping[str, float]]]

  def cells(self) -> list[Cell]:
    """Those whose length is known, by task and arm."""
    return [cell for cell in self._all_cells() if self._known(cell)]

  def uncalibrated(self) -> list[Cell]:
    """Those whose length is not."""
    return [cell for cell in self._all_cells() if not self._known(cell)]

  def _all_cells(self) -> list[Cell]:
    every = itertools.product(self.plan.tasks, self.plan.arms, self.plan.methods)
    return list(itertools.starmap(Cell, every))

  def _known(self, cell: Cell) -> bool:
    paced = {cell.arm, self._sweep_cell(cell).arm} & set(PACED)
    return not paced or cell.method.name in self.paces.get(cell.task, {})

  def _pace(self, cell: Cell) -> Pace | None:
    return self.paces[cell.task][cell.method.name] if cell.arm in PACED else None

  def warm_start(self) -> None:
    """Makes the policies that all methods of a task and a seed begin with."""
    seeds = [*self.plan.seeds, *(self.plan.sweep_seeds if self.plan.rates else ())]
    pairs = itertools.product(self.plan.tasks, seeds)
    self.maker.make([self.plan.warm_start(*pair) for pair in pairs])

  def calibrate(self) -> None:
    """Makes the runs that tell an iteration's tokens and seconds, one at a time."""
    unknown = {(cell.task, cell.method.name): cell.method for cell in self.uncalibrated()}
    for (task, _), method in unknown.items():
      run = self.plan.calibration(method, task)
      self.maker.make([run], jobs=1)
      if run.finished():
        self.paces.setdefault(task, {})[method.name] = pace(read_metrics(run.workdir))
        write_calibration(self.plan.folder / CALIBRATION_FILE, self.paces)

  def _sweep_cell(self, cell: Cell) -> Cell:
    return cell._replace(arm=self.plan.sweep_arm or cell.arm)

  def _sweep_runs(self, cell: Cell, rate: float) -> list[Run]:
    cell = self._sweep_cell(cell)
    return [
      self.plan.sweep(cell.method, cell.task, cell.arm, rate, seed, self._pace(cell))
      for seed in self.plan.sweep_seeds
    ]

  def swept(self, cell: Cell) -> tuple[list[float], Scores | None]:
    """The rates to try as far as is known, and, when all are tried, their final accuracies."""
    tried = list(self.plan.rates)
    most = len(tried) + self.plan.extensions
    while True:
      runs = {rate: self._sweep_runs(cell, rate) for rate in tried}
      if not all(run.finished() for of_rate in runs.values() for run in of_rate):
        return tried, None
      scores = {rate: [final_accuracy(run.workdir) for run in runs[rate]] for rate in tried}
      more = beyond(scores) if len(tried) < most else None
      if more is None:
        return tried, scores
      tried.append(more)

  def _given_rate(self, cell: Cell) -> float | None:
    return self.given_rates.get(cell.task, {}).get(cell.arm, {}).get(cell.method.name)

  def _sweeps(self) -> list[Run]:
    cells = [cell for cell in self.cells() if self.plan.rates and self._given_rate(cell) is None]
    return [
      run for cell in cells for rate in self.swept(cell)[0] for run in self._sweep_runs(cell, rate)
    ]

  def sweep(self) -> None:
    """Tries the rates of all cells, and further ones where the best lies at an edge."""
    self.maker.make(self._sweeps())
    while self.maker.ready(runs := self._sweeps()):
      self.maker.make(runs)
    path = self.plan.folder / RATES_FILE
    chosen = read_rates(path) if path.exists() else {}  # of methods that this call leaves out
    for cell in self.cells():
      if (rate := self.rate(cell)) is not None:
        chosen.setdefault(cell.task, {}).setdefault(cell.arm, {})[cell.method.name] = rate
    path.write_text(json.dumps(chosen, indent=2) + "\n")

  def rate(self, cell: Cell) -> float | None:
    """The chosen rate; None as long as there is none, or if each config keeps its own."""
    if (given := self._given_rate(cell)) is not None:
      return given
    scores = self.swept(cell)[1]
    return best(scores) if scores else None

  def _tests(self, cell: Cell) -> list[Run]:
    rate = self.rate(cell)
    if rate is None and self.plan.rates:
      return []
    return [
      self.plan.test(cell.method, cell.task, cell.arm, rate, seed, self._pace(cell))
      for seed in self.plan.seeds
    ]

  def test(self) -> None:
    """Makes the runs that count, of all cells whose rate is chosen."""
    self.maker.make([run for cell in self.cells() for run in self._tests(cell)])

  def results(self, task: str, arm: str) -> dict[str, Any]:
    """Every figure of an arm of a task, as far as there are any; JSON can hold it."""
    methods = [self._result(cell) for cell in self.cells() if (cell.task, cell.arm) == (task, arm)]
    return {
      "task": task,
      "arm": arm,
      "budget": self.plan.budgets.told(arm),
      "split": self.plan.split,
      "sweep_arm": self.plan.sweep_arm or arm,
      "sweep_seeds": list(self.plan.sweep_seeds),
      "grid": list(self.plan.rates),
      "set": dict(self.plan.fields),
      "methods": [method for method in methods if method["runs"]],
    }

  def _result(self, cell: Cell) -> dict[str, Any]:
    method, task = cell.method, cell.task
    updates = self.plan.updates(method, task)
    tried, scores = self.swept(cell) if self._given_rate(cell) is None else ([], None)
    own_rate = self.plan.config(method, task).optimizer.learning_rate
    runs = [
      {
        "seed": run.fields["seed"],
        "workdir": str(run.workdir.relative_to(self.plan.folder)),
        "command": run.told,
        **figures(run.workdir, updates, self._pace(cell)),
      }
      for run in self._tests(cell)
      if run.finished()
    ]
    return {
      "name": method.name,
      "config": f"{method.config}:{task}",
      "overrides": dict(method.fields(task)),
      "rate": self.rate(cell) or own_rate,
      "sweep": [{"rate": rate, "accuracies": scores[rate]} for rate in tried] if scores else [],
      "pace": dataclasses.asdict(paced) if (paced := self._pace(cell)) else None,
      "runs": runs,
    }
