"""Runs of the real command in processes of their own, one or several a run, and how two compare."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from spo_jax.errors import UserError
from spo_jax.infra.metrics import METRICS_FILE

REPOSITORY = pathlib.Path(__file__).parents[1]
POLL_S = 0.05
# What differs between runs that are the same: seconds, and what is made of them.
TIMINGS = ("time/", "speed/")
# Fields of a run that is little but its start, with a model of one layer.
TINY = {
  "new_model.layers": 1,
  "new_model.width": 16,
  "new_model.head_dim": 8,
  "new_model.ffn": 32,
  "warm_start.max_steps": 4,
  "warm_start.eval_every": 2,
  "warm_start.batch_size": 8,
  "warm_start.eval_prompts": 8,
  "rollout.suffix_chunks": 1,  # each is a loop to compile
  "packing.rows": 8,
  "eval.prompts": 8,
}
# An untrained policy earns the reward often, not always: there is something to train.
SIGNAL = {
  "data.grader": "benchmarks.run_processes:has_digit",
  "advantage.grade_unfinished": True,
}


def has_digit(response: str, answer: str) -> float:
  """1.0 for a response in which a digit stands, whatever the answer."""
  del answer
  return float(any(letter in "0123456789" for letter in response))


def flags(fields: Mapping[str, Any]) -> list[str]:
  """The words of a command line that set a config's fields."""
  return [f"--config.{name}={value}" for name, value in fields.items()]


def free_port() -> int:
  """A port that nobody listens on."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start(
  config: str,
  fields: Sequence[str],
  workdir: pathlib.Path,
  processes: int = 1,
  variables: Mapping[str, str] | None = None,
) -> list[subprocess.Popen]:
  """The processes of a run, which go on from what the folder holds.

  Process i writes what it tells to `WORKDIR.log.i`.

  Args:
    config: the config's file, as for `spo_jax.main`.
    fields: words like --config.field=value, and other flags.
    workdir: absolute.
    processes: of the run, all on this machine.
    variables: of the environment, beside those of this process.
  """
  words = [sys.executable, "-m", "spo_jax.main", f"--config={config}", f"--workdir={workdir}"]
  several = [f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"]
  environment = os.environ | (variables or {})
  started = []
  for i in range(processes):
    own = [*several, f"--process_id={i}"] if processes > 1 else []
    with open(f"{workdir}.log.{i}", "ab") as log:
      started.append(
        subprocess.Popen(
          [*words, *fields, *own], cwd=REPOSITORY, stdout=log, stderr=log, env=environment
        )
      )
  return started


def wait_all(processes: list[subprocess.Popen], most_s: float) -> tuple[list[int], float]:
  """(exit statuses, seconds until all had ended).

  Raises:
    UserError: if one has not ended in time; it is killed.
  """
  began = time.monotonic()
  while any(process.poll() is None for process in processes):
    if time.monotonic() - began > most_s:
      for process in processes:
        process.kill()
        process.wait()
      raise UserError(f"a process went on for {most_s:.0f} s, and was killed")
    time.sleep(POLL_S)
  return [process.returncode for process in processes], time.monotonic() - began


def metrics_without_timings(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The metrics of a run that does not write any more, without those that seconds go into."""
  return [
    {name: value for name, value in row.items() if not name.startswith(TIMINGS)}
    for row in map(json.loads, (workdir / METRICS_FILE).read_text().splitlines())
  ]
