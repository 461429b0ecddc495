"""Devices of a machine that is not there, for ahead-of-time compilation."""

import dataclasses
import os
from collections.abc import Sequence

import jax

from spo_jax.errors import UserError

GIB = 2**30

# Memory of a chip that the compiler gives to programs, GiB: what libtpu names when a program needs
# more. It is a little less than is sold (v5e 16, v5p 95, v6e 32).
CHIP_GIB = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}

# libtpu must not look for TPUs or lock them for this process; it is used as a compiler alone.
_LIBTPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Some chips, and the memory of each."""

  name: str
  devices: Sequence[jax.Device]
  chip_bytes: int


def open_topology(name: str, chip_gib: float | None = None) -> Topology:
  """The devices of `v5e:4x4`, `v5p:2x2x2`, `v6e:4x4` and the like, or of `cpu:8`.

  Call it before JAX has looked for devices: CPU devices are made as many as are asked for, and
  accelerators of this machine are left alone.

  Args:
    name: kind of chip, and its grid; for `cpu` a number of virtual devices.
    chip_gib: memory of a chip; None is that of `CHIP_GIB`.

  Raises:
    UserError: if the topology or its chip's memory is unknown, or libtpu is not installed.
  """
  kind, _, grid = name.partition(":")
  known = chip_gib or CHIP_GIB.get(kind)
  if kind == "cpu" and known is None:
    raise UserError("--topology=cpu:N needs the memory of a device: --chip_gib=GIB")
  if known is None or not all(part.isdigit() for part in grid.split("x")):
    raise UserError(
      f"--topology {name!r} is unknown: give KIND:GRID with a kind of {', '.join(CHIP_GIB)}, such "
      "as v5e:4x4 or v5p:2x2x2, or cpu:N"
    )
  jax.config.update("jax_platforms", "cpu")
  devices = _cpu_devices(int(grid)) if kind == "cpu" else _tpu_devices(name)
  return Topology(name, devices, int(known * GIB))


def _cpu_devices(count: int) -> Sequence[jax.Device]:
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    pass  # they exist already
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise UserError(f"--topology=cpu:{count}: this process has {len(devices)} CPU devices already")
  return devices[:count]


def _tpu_devices(name: str) -> Sequence[jax.Device]:
  try:
    import libtpu  # noqa: F401 - its absence would be told in many lines
  except ImportError as error:
    raise UserError(
      f'--topology={name} is compiled by libtpu, which is not installed: pip install -e ".[plan]"'
    ) from error
  from jax.experimental import topologies

  for variable, value in _LIBTPU.items():
    os.environ.setdefault(variable, value)
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except Exception as error:  # libtpu raises whatever its version does
    reason = " ".join(str(error).split())[:160]
    raise UserError(f"--topology={name}: libtpu has no such topology ({reason})") from error
