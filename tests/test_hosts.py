"""Runs of several processes: what they compute, how they end, and on what they are resumed."""

import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.run_processes import metrics_without_timings
from spo_jax.errors import USER_ERROR_STATUS, UserError
from spo_jax.infra import hosts
from spo_jax.infra.stopping import STOPPED_STATUS
from tests import tiny_run
from tests.test_resume import FIELDS

DEVICES = 4
FIELDS = FIELDS | {"mesh__data": 2, "mesh__fsdp": 2, "iterations": 3, "checkpoint__every": 10}
FIELDS |= {"warm_start__max_steps": 0, "eval__every": 3}


def start(workdir, processes, apart=False, **fields):
  """Starts a run on as many processes, each with its share of the devices; apart: in workdirs of
  their own.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    coordinator = f"localhost:{free.getsockname()[1]}"
  several = [f"--coordinator={coordinator}", f"--num_processes={processes}", "--profile=1"]
  return [
    tiny_run.start(
      "spo_tree.py",
      workdir / str(i) if apart else workdir,
      flags=[*several, f"--process_id={i}"] if processes > 1 else [],
      devices=DEVICES // processes,
      **FIELDS | fields,
    )
    for i in range(processes)
  ]


def end(processes):
  """[(exit status, stderr)] of processes that end by themselves."""
  told = [process.communicate(timeout=300)[1] for process in processes]
  return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def test_two_processes_stopped_and_resumed_by_one_are_as_one(tmp_path):
  """Also on another mesh; and whichever of the processes is asked to end, all save and end."""
  (whole,) = end(start(tmp_path / "whole", 1))
  assert whole[0] == 0, whole[1]
  pair = start(tmp_path / "pair", 2)
  metrics = tmp_path / "pair" / "metrics.jsonl"
  lines = lambda: metrics.read_bytes().count(b"\n") if metrics.exists() else 0
  while lines() < 2 and all(process.poll() is None for process in pair):
    time.sleep(0.01)
  pair[1].send_signal(signal.SIGTERM)
  for status, errors in end(pair):
    assert status == STOPPED_STATUS, errors
    assert "the same command resumes it" in errors
  assert 2 <= lines() < 4
  traces = (tmp_path / "pair" / "profile" / "iteration_1").glob("*/plugins/profile/*/*.xplane.pb")
  assert sorted(path.parents[3].name for path in traces) == ["process_0", "process_1"]
  (resumed,) = end(start(tmp_path / "pair", 1, mesh__data=4, mesh__fsdp=1))
  assert resumed[0] == 0, resumed[1]
  of_whole, of_pair = (metrics_without_timings(tmp_path / name) for name in ("whole", "pair"))
  assert len(of_whole) == len(of_pair) == 4
  for one, other in zip(of_whole, of_pair, strict=True):
    assert one.keys() == other.keys()
    for name in ("tokens/sampled", "tokens/trained", "train/reward_mean", "eval/accuracy"):
      assert one.get(name) == other.get(name), name
    # Sums over devices are added up in another order.
    difference = [abs(one[name] - other[name]) for name in one if name.startswith("train/")]
    assert max(difference, default=0) < 1e-5


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shares_are_all_in_order(size, processes, monkeypatch):
  monkeypatch.setattr(hosts, "count", lambda: processes)
  dealt = []
  for process in range(processes):
    monkeypatch.setattr(hosts.jax, "process_index", lambda process=process: process)
    dealt += range(size)[hosts.share(size)]
  assert dealt == list(range(size))


def test_processes_that_share_no_folder_end_before_they_train(tmp_path):
  for status, errors in end(start(tmp_path, 2, apart=True)):
    assert status == USER_ERROR_STATUS
    assert "is not on a disk that all processes of the run share" in errors
  assert not list(tmp_path.glob("*/.shared-*"))


def test_alone_nothing_is_asked_of_others():
  array = np.arange(6.0).reshape(3, 2)
  assert hosts.join_shares(array, 3) is array
  assert hosts.any_of_each(True, False) == (True, False)
  assert hosts.of_first(7) == 7 and hosts.is_first()
  assert hosts.first_then_all(lambda: "done") == "done"


@pytest.mark.parametrize(
  ("environment", "found"),
  [
    ({}, False),
    ({"SLURM_NTASKS": "1"}, False),
    ({"SLURM_NTASKS": "4"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2", "JAX_PLATFORMS": "cpu"}, True),
  ],
)
def test_a_cluster_is_known_by_its_variables(environment, found):
  assert hosts.in_cluster({"JAX_PLATFORMS": "cpu"} | environment) == found


def test_a_process_whose_others_do_not_come_ends():
  program = (
    "from spo_jax.infra import hosts\nhosts.START_S = 2\nhosts.connect('localhost:{}', 2, 0)"
  )
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-c", program.format(port)]
  done = subprocess.run(
    command, env=tiny_run.environment(), capture_output=True, text=True, timeout=60, check=False
  )
  assert done.returncode == USER_ERROR_STATUS
  assert "processes did not all come within 2 s: start them all" in done.stderr


def test_a_process_number_that_cannot_be_is_told():
  with pytest.raises(UserError, match="--process_id=2 must be at least 0 and below"):
    hosts.connect("localhost:1", 2, 2)
