"""Entry point: `python -m spo_jax.main --config=configs/spo_tree.py --workdir=runs/spo_tree`.

The same command with the same workdir resumes. With --export=DIR the trained policy is written as a
Hugging Face model at the end; with --profile=3,4 these iterations are traced. On several hosts the
same command runs on each, with a workdir that they share; see `infra/hosts.py`.
"""

import contextlib
import dataclasses
import pathlib
import sys
import time

from absl import flags
from etils import epath

from spo_jax import command_line
from spo_jax.config import Config
from spo_jax.config_check import from_config_dict

_BEGAN = time.perf_counter()

# Fields that may change when a workdir is used again: none of them changes the result of an
# iteration, but for the order in which another mesh adds numbers up.
MAY_CHANGE = (
  "iterations",
  "checkpoint.every",
  "checkpoint.every_s",
  "checkpoint.keep",
  "checkpoint.keep_best",
  "checkpoint.grace_s",
  "mesh",
  "topology",
  "compilation_cache",
  "unstable_limit",
  "wandb",
  "config_file",
)

# What a run leaves that came so far that another config may not take its place.
RESULTS = ("checkpoints", "warm_start", "metrics.jsonl")

_EXPORT = flags.DEFINE_string("export", None, "folder for the trained policy, which must not exist")
_PROFILE = flags.DEFINE_list("profile", [], "iterations whose trace is written to WORKDIR/profile")
flags.mark_flag_as_required("workdir")


def train_from_flags() -> None:
  """Checks the config, claims the workdir, trains, exports."""
  config = from_config_dict(command_line.CONFIG.value, Config)
  workdir = pathlib.Path(command_line.WORKDIR.value).absolute()
  export = pathlib.Path(_EXPORT.value).absolute() if _EXPORT.value else None
  fields = dataclasses.asdict(config) | {"config_file": command_line.config_file()}
  # Imported after the checks that need no JAX: a misspelt field is reported at once.
  from spo_jax.infra import hosts, stopping
  from spo_jax.infra.compilation import keep_programs
  from spo_jax.infra.profiling import parse_iterations
  from spo_jax.infra.progress import open_progress
  from spo_jax.models.export import check_export
  from spo_jax.run import make_run
  from spo_jax.train import train

  profile = parse_iterations(_PROFILE.value, config.iterations)
  command_line.connect_hosts()
  folders = [workdir, *([config.checkpoint.folder] if config.checkpoint.folder else [])]

  alone = contextlib.ExitStack()

  def claim() -> None:
    if hosts.is_first():
      alone.enter_context(command_line.sole_user(workdir))
    for folder in map(epath.Path, folders):
      command_line.claim_workdir(folder, fields, results=RESULTS, may_change=MAY_CHANGE)

  hosts.first_then_all(claim)
  if not config.checkpoint.folder:
    hosts.check_shared(workdir)
  if export:
    check_export(export)
  keep_programs(config.compilation_cache)
  with (
    alone,
    stopping.on_sigterm(config.checkpoint.grace_s),
    open_progress(config.iterations, visible=hosts.is_first()) as progress,
    contextlib.closing(make_run(config, workdir, progress)) as run,
  ):
    progress.note(f"ready after {time.perf_counter() - _BEGAN:.1f} s")
    params = train(run, profile)
    if export:
      run.export(params, export)


if __name__ == "__main__":
  sys.exit(command_line.run_command(sys.argv, Config, train_from_flags))
