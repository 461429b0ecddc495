"""What the commands share: their flags, their mistakes, and the workdir that belongs to one config.

A command's exit status is 0 for done; 2 is a mistake of the user's, told in one line; 75 says that
the run was asked to end, has saved, and is resumed by the same command.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from spo_jax.config_check import check_field, with_hint
from spo_jax.errors import USER_ERROR_STATUS, Stopped, UserError
from spo_jax.infra.stopping import STOPPED_STATUS

# Of file systems that are full, or may not be written to.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

_WORDS: list[str] = []  # the command line where the config's flag looks for overrides
CONFIG = config_flags.DEFINE_config_file(
  "config", None, "FILE or FILE:variant", lock_config=True, sys_argv=_WORDS
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; a run that it holds is resumed")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "HOST:PORT of the first process of several; TPU VMs and Slurm need none"
)
_PROCESSES = flags.DEFINE_integer("num_processes", 1, "how many there are, with --coordinator")
_PROCESS = flags.DEFINE_integer("process_id", 0, "number of this one, likewise")


def run_command(argv: list[str], config_class: type, command: Callable[[], int | None]) -> int:
  """Parses the command line and does as it says.

  Args:
    argv: the command line, program first.
    config_class: dataclass whose fields the config has.
    command: what is done once the flags are parsed; it may return an exit status.

  Returns:
    The exit status; None of a command is 0.
  """
  if not {"-h", "--help"}.isdisjoint(argv[1:]):
    print(_help())
    return 0
  try:
    parse_flags(argv, config_class)
    logging.set_verbosity(logging.WARNING)
    return command() or 0
  except UserError as error:
    # Readers that a damaged checkpoint left half done complain when they are collected at exit.
    sys.unraisablehook = lambda _: None
    print(f"spo_jax: {error}", file=sys.stderr)
    return USER_ERROR_STATUS
  except OSError as error:
    if error.errno not in _NO_ROOM:
      raise
    print(
      f"spo_jax: {error.filename or 'a file'} cannot be written: {error.strerror}; once it can, "
      "the same command resumes from the newest checkpoint",
      file=sys.stderr,
    )
    return USER_ERROR_STATUS
  except Stopped as stop:
    print(f"spo_jax: {stop}: the same command resumes it", file=sys.stderr)
    return STOPPED_STATUS


def _help() -> str:
  """What the command that runs does, and its flags."""
  told = [sys.modules["__main__"].__doc__.strip(), flags.FLAGS.module_help(__name__)]
  own = flags.FLAGS.main_module_help()
  fields = "Any field of a config is set as --config.field=value: spo_jax/config.py lists them all."
  return "\n\n".join([*told, *([own] if own.strip() else []), fields])


def parse_flags(argv: list[str], config_class: type) -> None:
  """Parses the command line, overrides of config fields included.

  An override may stand anywhere, and of a field that is set twice the last value counts. By itself
  the library wants --config first, and joins the tuples that a field is given.

  Raises:
    UserError: for an unknown flag or field, a value of another type, a config file that is not
      named or cannot be read.
  """
  try:
    words = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
    given, arguments = split_words(words, config_class)
    file = given.pop("config", "").partition("=")[2]
    if not file:
      raise UserError("no config is named: give --config=FILE, as in --config=configs/spo_tree.py")
    if not os.path.exists(path := file.partition(":")[0]):
      raise UserError(f"there is no config file {path!r}")
    _WORDS[:] = [f"--config={file}", *given.values()]
    flags.FLAGS([argv[0], *_WORDS])
  # The library raises TypeError and ValueError for a value of another type than the field's.
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(with_hint(" ".join(str(error).split()))) from error
  if arguments:
    raise UserError(f"unexpected argument {arguments[0]!r}: fields are set as --config.field=value")


def split_words(words: Sequence[str], config_class: type) -> tuple[dict[str, str], list[str]]:
  """Flags by name, each with its value in one word, and the words that belong to no flag.

  Flags are in the order in which they, or those that replace them, are given.

  Raises:
    UserError: if the config has no such field.
  """
  given: dict[str, str] = {}
  arguments = []
  left = iter(words)
  for word in left:
    name, equals, _ = word.removeprefix("-").removeprefix("-").partition("=")
    if word == "--":
      arguments += left
    elif not word.startswith("-") or not name:
      arguments.append(word)
    else:
      negated = name.startswith("noconfig.")
      name = name.removeprefix("no") if negated else name
      if _takes_value(name, config_class) and not (equals or negated):
        word = "=".join([word, *itertools.islice(left, 1)])
      given.pop(name, None)
      given[name] = word
  return given, arguments


def _takes_value(name: str, config_class: type) -> bool:
  """Whether a flag has a value, which is the next word unless it is set with =."""
  if name.startswith("config."):
    return check_field(config_class, name.removeprefix("config.")) is not bool
  return name in flags.FLAGS and not flags.FLAGS[name].boolean


def connect_hosts() -> None:
  """Joins the run's other processes, as the flags say; see `hosts.connect`."""
  from spo_jax.infra import hosts  # it imports JAX, which mistakes need not wait for

  if not _COORDINATOR.value and (_PROCESSES.present or _PROCESS.present):
    raise UserError("--num_processes and --process_id go with --coordinator=HOST:PORT")
  hosts.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)


def config_file() -> str:
  """FILE:variant as the command line named it."""
  return flags.FLAGS["config"].config_filename


def claim_workdir(
  workdir: epath.Path,
  config: dict[str, Any],
  *,
  results: Sequence[str],
  may_change: Sequence[str] = (),
) -> None:
  """Writes `config.json`, or checks that the workdir's own is the same.

  Args:
    workdir: the folder, made if it does not exist; local or gs://.
    config: nested fields.
    results: files and folders one of which a run of that config has left, if it came so far that
      another config may not take its place.
    may_change: fields, or groups of them, that may differ when a workdir is used again.

  Raises:
    UserError: if the workdir belongs to a run with another config, or cannot be written.
  """
  path = workdir / "config.json"
  config = json.loads(json.dumps(config))
  try:
    if path.exists():
      if (written := json.loads(path.read_text())) == config:
        return  # so of a run's processes the first alone writes
      if not isinstance(written, dict):
        raise UserError(f"{path} is no config of a run: choose another --workdir")
      has_results = any((workdir / name).exists() for name in results)
      for name, (before, now) in difference(written, config).items():
        if has_results and not any(f"{name}.".startswith(f"{field}.") for field in may_change):
          raise UserError(
            f"{workdir} holds a run with another config (config.{name} was {before!r} and "
            f"is {now!r}): set it as it was, or choose another --workdir"
          )
    workdir.mkdir(parents=True, exist_ok=True)
    unfinished = workdir / "config.tmp"
    unfinished.write_text(json.dumps(config, indent=2) + "\n")
    unfinished.replace(path)
  except OSError as error:
    raise UserError(f"{workdir} cannot be used: {error.strerror or error}") from error
  except ImportError as error:  # names the package that a bucket needs
    raise UserError(f"{workdir} cannot be used: {error}") from error
  except ValueError as error:  # no JSON, or no text
    raise UserError(f"{path} is no JSON file ({error}): choose another --workdir") from error


@contextlib.contextmanager
def sole_user(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other runs out of a workdir, where its file system knows locks; makes it if need be.

  Raises:
    UserError: if a run is there already, or the workdir cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = (workdir / "lock").open("w")
  except OSError as error:
    raise UserError(f"{workdir} cannot be used: {error.strerror}") from error
  with lock as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f"{workdir} is in use by a run on this machine or another: wait for it, or choose another "
        "--workdir"
      ) from error
    except OSError:
      pass
    yield


def difference(
  old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
  """The fields in which two nested configs differ: dotted names, with (old, new) values."""
  found = {}
  for name in [*new, *(n for n in old if n not in new)]:
    a, b = old.get(name), new.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      found |= difference(a, b, f"{prefix}{name}.")
    elif a != b:
      found[prefix + name] = (a, b)
  return found
