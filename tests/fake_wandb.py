"""A stand-in for the package `wandb`, which remembers what it was asked to do."""

import sys
import types

import pytest


class FakeRun:
  """What `init` returns."""

  def __init__(self, given: dict):
    self.given, self.logged, self.finished = given, [], False

  def log(self, metrics: dict, step: int) -> None:
    self.logged.append((step, metrics))

  def finish(self) -> None:
    self.finished = True


def install(patch: pytest.MonkeyPatch, refusal: str = "") -> list[FakeRun]:
  """Puts the package in place of the real one, and returns its runs, which `init` adds to.

  Args:
    patch: undoes it.
    refusal: what `init` raises; "" nothing.
  """
  module, runs = types.ModuleType("wandb"), []

  class Error(Exception):
    """As the package's own, which all of its errors are."""

  def init(**given) -> FakeRun:
    if refusal:
      raise Error(refusal)
    runs.append(FakeRun(given))
    return runs[-1]

  module.init, module.Error = init, Error
  patch.setitem(sys.modules, "wandb", module)
  return runs
