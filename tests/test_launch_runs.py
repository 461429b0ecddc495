"""The launchers at work, with small scripts in place of gcloud, Slurm, Kubernetes and the run."""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from tests.tiny_run import REPOSITORY

ARGUMENTS = ["--config=c", "--workdir=a b"]
SAVED, MISTAKE = 75, 2
DEADLINE_S = 20


@contextlib.contextmanager
def heeding_interrupts():
  """What is started here heeds SIGINT, also where the suite ignores it, as what a script leaves in
  the background does."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


class Machine:
  """A folder with the launchers, and the programs that they find there."""

  def __init__(self, folder):
    self.folder = folder
    shutil.copytree(REPOSITORY / "launch", folder / "launch")
    (folder / "launch" / "environment.sh").write_text("")
    (folder / "bin").mkdir()

  def program(self, name, body):
    """A program that notes its arguments in `calls`, and does what the shell script says."""
    path = self.folder / "bin" / name
    path.write_text(f'#!/usr/bin/env bash\necho {name} "$@" >> {self.folder}/calls\n{body}\n')
    path.chmod(0o755)

  def replies(self, name, lines):
    """Lines of shell for a program to run one after the other, a line a call; the last repeats."""
    (self.folder / f"{name}.replies").write_text("".join(f"{line}\n" for line in lines))
    return (
      f"cd {self.folder}; line=$(head -n 1 {name}.replies); "
      f'[[ $(wc -l < {name}.replies) == 1 ]] || sed -i 1d {name}.replies; eval "$line"'
    )

  def calls(self):
    path = self.folder / "calls"
    return path.read_text().splitlines() if path.exists() else []

  def start(self, script, *words, **variables):
    path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
    with heeding_interrupts():
      return subprocess.Popen(
        ["bash", self.folder / "launch" / script, *words],
        env={"PATH": path, "HOME": str(self.folder)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )

  def call(self, script, *words, **variables):
    """(exit status, output)."""
    process = self.start(script, *words, **variables)
    output, errors = process.communicate(timeout=DEADLINE_S)
    return process.returncode, output + errors


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


def wait_for(condition):
  until = time.monotonic() + DEADLINE_S
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.02)


# Ends with SAVED when it is told to stop, and of itself where a test failed.
PATIENT = 'trap "exit 75" TERM; touch {ready}; for _ in {{1..600}}; do sleep 0.05; done'


def test_worker_starts_and_stops_a_run(machine):
  ready = machine.folder / "ready"
  machine.program("python", PATIENT.format(ready=ready))
  state = lambda: machine.call("worker.sh", "state")[1].strip()
  assert state() == "none"
  assert machine.call("worker.sh", "start", *ARGUMENTS, PYTHON="python") == (0, "")
  assert state() == "running"
  status, said = machine.call("worker.sh", "start", *ARGUMENTS, PYTHON="python")
  assert status == 1 and "a run is under way" in said
  wait_for(ready.exists)
  assert machine.call("worker.sh", "stop") == (0, "")
  assert state() == str(SAVED)
  assert machine.calls() == ["python -m spo_jax.main --config=c --workdir=a b"]


def test_worker_kills_a_run_that_does_not_stop(machine):
  ready = machine.folder / "ready"
  machine.program("python", f'trap "" TERM; touch {ready}; sleep 60')
  machine.call("worker.sh", "start", *ARGUMENTS, PYTHON="python")
  wait_for(ready.exists)
  assert machine.call("worker.sh", "stop", GRACE="1")[0] == 0
  wait_for(lambda: machine.call("worker.sh", "state")[1].strip() == str(128 + signal.SIGKILL))


def test_worker_keeps_log_and_status(machine):
  machine.program("python", "echo out; echo error >&2; exit 3")
  machine.call("worker.sh", "start", *ARGUMENTS, PYTHON="python")
  wait_for(lambda: machine.call("worker.sh", "state")[1] == "3\n")
  assert (machine.folder / "runs" / "worker" / "log").read_text() == "out\nerror\n"


def test_worker_whose_machine_began_again_is_lost(machine):
  folder = machine.folder / "runs" / "worker"
  folder.mkdir(parents=True)
  gone = subprocess.Popen(["true"])
  gone.wait()
  (folder / "pid").write_text(f"{gone.pid}\n")
  assert machine.call("worker.sh", "state") == (0, "lost\n")


def resume(machine, slices, runs, **variables):
  """(exit status, what was done in turn) of tpu.sh resume, by what gcloud says at each look."""
  machine.program("git", "exit 0")
  machine.program(
    "gcloud",
    f"""case "$*" in
    *describe*) {machine.replies("slices", [f"echo {s}" if s else "exit 1" for s in slices])} ;;
    *state*) {machine.replies("runs", [f"echo {r}" if r else "exit 255" for r in runs])} ;;
    esac""",
  )
  settings = {"ZONE": "z", "TYPE": "v4-16", "POLL": "0"} | variables
  status, _ = machine.call("tpu.sh", "resume", *ARGUMENTS, **settings)
  deeds = []
  for call in machine.calls():
    words = call.split()
    if words[0] == "gcloud" and words[4] in ("create", "delete", "scp"):
      deeds.append(words[4])
    elif "worker.sh start" in call or "worker.sh stop" in call:
      deeds.append("start" if "worker.sh start" in call else "stop")
  return status, deeds


def test_resume_begins_on_a_new_slice_and_ends_with_the_run(machine):
  slices = ["", "CREATING", "READY"]
  status, deeds = resume(machine, slices, ["none", "running", "", "running", "0"])
  assert (status, deeds) == (0, ["create", "scp", "start"])


def test_resume_makes_a_slice_anew(machine):
  slices = ["READY", "PREEMPTED", "READY"]
  status, deeds = resume(machine, slices, ["running", "none", "0"])
  assert (status, deeds) == (0, ["delete", "create", "scp", "start"])


def test_resume_starts_a_run_again_that_was_stopped_or_lost(machine):
  states = [str(SAVED), "lost", "running", "0"]
  status, deeds = resume(machine, ["READY"], states, CRASHES="1")
  assert (status, deeds) == (0, ["stop", "start"] * 2)


def test_resume_of_a_queued_slice(machine):
  slices = ["WAITING_FOR_RESOURCES", "ACTIVE", "READY", "SUSPENDED", "ACTIVE", "READY"]
  status, deeds = resume(machine, slices, ["running", "0"], QUEUED="1")
  assert (status, deeds) == (0, ["delete", "create"])


def test_resume_gives_up(machine, tmp_path):
  assert resume(machine, ["READY"], [str(MISTAKE)]) == (MISTAKE, [])
  (tmp_path / "second").mkdir()
  crashing = Machine(tmp_path / "second")
  assert resume(crashing, ["READY"], ["1", "139"], CRASHES="2") == (1, ["stop", "start"])


@pytest.mark.parametrize("status", [0, 1, MISTAKE, SAVED])
def test_a_slurm_job_goes_back_into_the_queue_when_it_has_saved(machine, status):
  machine.program("srun", f"exit {status}")
  machine.program("scontrol", "")
  assert machine.call("slurm.sh", *ARGUMENTS, SLURM_JOB_ID="7") == (status, "")
  srun, *rest = machine.calls()
  assert srun.endswith("python -m spo_jax.main --config=c --workdir=a b")
  assert rest == (["scontrol requeue 7"] if status == SAVED else [])


def test_gpu_goes_on_only_if_asked(machine):
  machine.program("python", machine.replies("runs", [f"exit {SAVED}", f"exit {SAVED}", "exit 3"]))
  assert machine.call("gpu.sh", *ARGUMENTS) == (SAVED, "")
  assert len(machine.calls()) == 1
  assert machine.call("gpu.sh", *ARGUMENTS, RESTART="1") == (3, "")
  assert len(machine.calls()) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_gpu_that_is_told_to_end_ends_its_run(machine, number):
  ready = machine.folder / "ready"
  machine.program("python", PATIENT.format(ready=ready))
  process = machine.start("gpu.sh", *ARGUMENTS, RESTART="1")
  wait_for(ready.exists)
  process.send_signal(number)
  process.communicate(timeout=DEADLINE_S)
  assert process.returncode == SAVED and len(machine.calls()) == 1


def test_gke_hands_the_manifest_to_kubectl(machine):
  machine.program("kubectl", f"cat > {machine.folder}/manifest")
  assert machine.call("gke.sh", "run", *ARGUMENTS, IMAGE="i") == (0, "")
  assert machine.calls() == ["kubectl --namespace=default create --filename=-"]
  assert yaml.safe_load((machine.folder / "manifest").read_text())["kind"] == "JobSet"
