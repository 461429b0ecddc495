"""From what is asked for to runs: their folders, their fields, and what they start from."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

from benchmarks.comparison.budgets import Budgets, Pace, length
from benchmarks.comparison.methods import METHODS, Fields, Method, load_config
from benchmarks.comparison.runs import Run
from spo_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is compared, and how.

  Attributes:
    folder: everything lies below it.
    methods: the first is what the others are held against.
    tasks: variants of their configs.
    arms: what is held equal; see `budgets.ARMS`.
    seeds: of the runs that count.
    sweep_seeds: of the runs that choose the rates.
    rates: the grid; empty takes each config's own rate.
    extensions: most rates that are tried beyond the grid.
    sweep_arm: the arm whose sweep serves all; "" sweeps in each.
    split: that the runs that count are evaluated on.
    evaluations: points of a curve after the first.
    fields: set in every run.
    budgets: of the arms.
    calibration_iterations: length of the runs that tell tokens and seconds of an iteration.
  """

  folder: pathlib.Path
  methods: Sequence[Method]
  tasks: Sequence[str]
  arms: Sequence[str]
  seeds: Sequence[int]
  sweep_seeds: Sequence[int]
  rates: Sequence[float]
  extensions: int
  sweep_arm: str
  split: str
  evaluations: int
  fields: Fields
  budgets: Budgets
  calibration_iterations: int
  _configs: dict[tuple[str, str], Config] = dataclasses.field(default_factory=dict)

  def config(self, method: Method, task: str) -> Config:
    """The config of a method on a task."""
    key = (method.name, task)
    if key not in self._configs:
      self._configs[key] = load_config(method, task, self.fields)
    return self._configs[key]

  def updates(self, method: Method, task: str) -> int:
    """Updates of an iteration."""
    config = self.config(method, task)
    return config.minibatches * config.epochs

  def _run(
    self,
    workdir: pathlib.Path,
    method: Method,
    task: str,
    fields: Fields,
    start: pathlib.Path | None = None,
  ) -> Run:
    fields = {**method.fields(task), **self.fields, **fields}
    return Run(workdir, f"{method.config}:{task}", fields, start)

  def warm_start(self, task: str, seed: int) -> Run:
    """The run that makes the policy which all methods begin with; RL is cut to one iteration."""
    workdir = self.folder / "warm_start" / f"{task}-seed{seed}"
    return self._run(workdir, METHODS[0], task, {"seed": seed, "iterations": 1})

  def calibration(self, method: Method, task: str) -> Run:
    """The run that tells the pace of a method."""
    seed, count = self.seeds[0], self.calibration_iterations
    fields = {"seed": seed, "iterations": count, "eval.every": count}
    workdir = self.folder / "calibration" / f"{task}-{method.name}"
    return self._run(workdir, method, task, fields, self.warm_start(task, seed).workdir)

  def sweep(
    self, method: Method, task: str, arm: str, rate: float, seed: int, paced: Pace | None
  ) -> Run:
    """A run that helps to choose a rate, evaluated on the validation split."""
    folder = self.folder / task / arm / "sweep"
    return self._train(folder, method, task, arm, rate, seed, paced, "validation")

  def test(
    self, method: Method, task: str, arm: str, rate: float | None, seed: int, paced: Pace | None
  ) -> Run:
    """A run that counts; its rate is the config's own if none is given."""
    folder = self.folder / task / arm / "test"
    return self._train(folder, method, task, arm, rate, seed, paced, self.split)

  def _train(
    self,
    folder: pathlib.Path,
    method: Method,
    task: str,
    arm: str,
    rate: float | None,
    seed: int,
    paced: Pace | None,
    split: str,
  ) -> Run:
    fields = {"seed": seed, **length(self.config(method, task), arm, self.budgets, paced)}
    name = f"{method.name}-seed{seed}"
    if rate is not None:
      fields["optimizer.learning_rate"] = rate
      name = f"{method.name}-lr{rate:g}-seed{seed}"
    fields["eval.split"] = split
    fields["eval.every"] = math.ceil(fields["iterations"] / self.evaluations)
    return self._run(folder / name, method, task, fields, self.warm_start(task, seed).workdir)
