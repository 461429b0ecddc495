"""Machines that are not there: their devices, their memory, and mistakes in one line."""

import os
import sys
import types

import jax
import pytest
from jax.experimental import topologies

from spo_jax.errors import UserError
from spo_jax.infra.topology import GIB, open_topology


@pytest.fixture(autouse=True)
def eight_devices():
  """Makes the devices of this process: a topology would make as many as it asks for."""
  assert len(jax.devices()) == 8


@pytest.fixture
def libtpu(monkeypatch):
  """Stands for libtpu: it knows v5e:2x2 alone. Returns the environment that it is asked in."""

  def describe(platform, topology_name):
    if topology_name != "v5e:2x2":
      raise RuntimeError("Invalid topology:\n" + "x" * 1000)
    return types.SimpleNamespace(devices=[platform] * 4)

  monkeypatch.setitem(sys.modules, "libtpu", types.ModuleType("libtpu"))
  monkeypatch.setattr(topologies, "get_topology_desc", describe)
  monkeypatch.setattr(os, "environ", {"TPU_MIN_LOG_LEVEL": "0"})
  return os.environ


def test_cpu_devices_are_as_many_as_asked_for():
  topology = open_topology("cpu:4", 0.5)
  assert len(topology.devices) == 4 and topology.chip_bytes == GIB // 2


def test_tpus_have_their_known_memory_or_that_of_the_command_line(libtpu):
  topology = open_topology("v5e:2x2")
  assert topology.devices == ["tpu"] * 4 and topology.chip_bytes == 15.75 * GIB
  assert open_topology("v5e:2x2", 8.0).chip_bytes == 8 * GIB
  # What the user has set is left.
  assert libtpu["TPU_SKIP_MDS_QUERY"] == "1" and libtpu["TPU_MIN_LOG_LEVEL"] == "0"


def test_a_grid_that_libtpu_does_not_know_is_one_line(libtpu):
  with pytest.raises(UserError, match="v5e:9x9: libtpu has no such topology .Invalid") as caught:
    open_topology("v5e:9x9")
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_mistakes_are_one_line(monkeypatch):
  for name in ("v9:2x2", "v5e", "v5e:4xq", ""):
    with pytest.raises(UserError, match="is unknown: give KIND:GRID with a kind of v5e, v5p, v6e"):
      open_topology(name)
  with pytest.raises(UserError, match="cpu:N needs the memory of a device: --chip_gib"):
    open_topology("cpu:8")
  with pytest.raises(UserError, match="cpu:99: this process has 8 CPU devices"):
    open_topology("cpu:99", 1.0)
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(UserError, match=r'not installed: pip install -e "\.\[plan\]"'):
    open_topology("v5e:4x4")
