"""One mesh, and one table from logical axes to mesh axes: shardings are decided here alone."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spo_jax.errors import UserError
from spo_jax.infra import hosts

AXES = ("data", "fsdp", "sequence", "tensor")

# Mesh axes that rows are split over: those of prompts, prefixes and caches, and packed rows, whose
# tokens are split over "sequence".
ROWS = ("data", "fsdp", "sequence")
PACKED_ROWS = ("data", "fsdp")

# Mesh axes that the weights of decode are split over. `tensor` first: when rows are split over fsdp
# again, what `tensor` alone splits are then runs of channels, and the compiler need not gather all.
SPREAD = ("tensor", "fsdp")
_BESIDE_SPREAD = ("data", "sequence")

# Logical axis of a parameter -> mesh axis. An axis that its mesh axis does not divide stays whole.
PARAM_RULES = {
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "ffn": "tensor",
  "width": "fsdp",
}


def make_mesh(
  data: int,
  fsdp: int,
  tensor: int,
  devices: Sequence[jax.Device] | None = None,
  *,
  sequence: int = 1,
) -> Mesh:
  """The mesh of the first devices, as many as its axes want; an axis of -1 takes all that are left.

  Args:
    data: devices along the axis.
    fsdp: likewise.
    tensor: likewise.
    devices: what the mesh is made of; None is all of the run's hosts.
    sequence: devices along the axis.

  Raises:
    UserError: if the axes do not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(data, fsdp, tensor, len(devices), sequence=sequence)
  if (size := math.prod(shape)) > len(devices):
    text = " x ".join(f"{name} {n}" for name, n in zip(AXES, shape, strict=True))
    raise UserError(f"mesh: {text} needs {size} devices, there are {len(devices)}")
  return Mesh(_grid(devices[:size], shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
  """Devices in an order in which neighbours along the inner axes are near each other.

  TPUs are laid out by their links; of several slices, joined by a slower network, each has whole
  parts of the data axis. Other devices come host by host.
  """
  if devices[0].platform != "tpu":
    return np.asarray(devices).reshape(shape)
  # Devices of a topology that is not there are of one slice, and have no index of it.
  indexed = hasattr(devices[0], "slice_index")
  slices = len({device.slice_index for device in devices}) if indexed else 1
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  data, *inner = shape
  if data % slices:
    raise UserError(f"mesh: data {data} must be a multiple of the {slices} slices of the pod")
  return mesh_utils.create_hybrid_device_mesh(
    (data // slices, *inner),
    (slices, *[1] * len(inner)),
    devices,
    allow_split_physical_axes=True,
  )


def mesh_shape(
  data: int, fsdp: int, tensor: int, devices: int, *, sequence: int = 1
) -> tuple[int, ...]:
  """Sizes of `AXES`, with what is left of a number of devices for the one that is -1.

  Raises:
    UserError: if an axis is neither positive nor -1, two are -1, or the others do not divide the
      number of devices.
  """
  sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
  text = ", ".join(f"{name} {size}" for name, size in sizes.items())
  open_axes = [name for name, size in sizes.items() if size == -1]
  if len(open_axes) > 1 or any(size < 1 for size in sizes.values() if size != -1):
    raise UserError(f"mesh: {text} must be positive, and one of them may be -1")
  if open_axes:
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed:
      raise UserError(f"mesh: {text}: {fixed} does not divide the {devices} devices")
    sizes[open_axes[0]] = devices // fixed
  return tuple(sizes[name] for name in AXES)


def row_shards(mesh: Mesh) -> int:
  """Number of parts that rows of prompts are split into."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def packed_row_shards(mesh: Mesh) -> int:
  """Number of parts that packed rows are split into."""
  return math.prod(mesh.shape[axis] for axis in PACKED_ROWS)


def row_sharding(mesh: Mesh) -> NamedSharding:
  """How the rows (axis 0) of arrays are split."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def shard_rows(mesh: Mesh, tree):
  """Puts arrays on the mesh, split over their rows."""
  return hosts.put(tree, lambda _: row_sharding(mesh))


def keep_rows_split(tree, rows: NamedSharding | None):
  """Pins the leading axis of arrays to its mesh axes; the compiler may otherwise gather it."""
  return tree if rows is None else _pin_leading_axis(tree, rows.mesh, *rows.spec)


def whole_on_each(tree, rows: NamedSharding | None):
  """Gathers the leading axis: every device can then take the rows that it needs."""
  return tree if rows is None else _pin_leading_axis(tree, rows.mesh, None)


def _pin_leading_axis(tree, mesh: Mesh, axis):
  def pin(x):
    spec = PartitionSpec(axis, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(pin, tree)


def split_tokens(mesh: Mesh | None, x: jax.Array) -> jax.Array:
  """What each token of packed rows has, [B, T, ...], split over the devices of a row."""
  if mesh is None or mesh.shape["sequence"] == 1:
    return x
  spec = PartitionSpec(PACKED_ROWS, "sequence", *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 2))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def in_turn(move: Callable[[Any], Any], trees: Sequence[Any]) -> list[Any]:
  """[move(tree) for tree in trees], one after the other, inside a compiled function.

  Rows move between devices. Left to itself the compiler moves the caches of all layers at once, and
  holds all of what it gathered.
  """
  moved = []
  for tree in trees:
    if moved:
      tree, moved[-1] = jax.lax.optimization_barrier((tree, moved[-1]))
    moved.append(move(tree))
  return moved


def shard_batch(mesh: Mesh, batch):
  """Puts a batch of [M, B, ...] arrays on the mesh, split over B; arrays [M] go to every device."""
  spec = lambda x: PartitionSpec(None, PACKED_ROWS) if x.ndim > 1 else PartitionSpec()
  return hosts.put(batch, lambda x: NamedSharding(mesh, spec(x)))


def param_shardings(mesh: Mesh, boxed_params):
  """NamedShardings of parameters from their logical axis names.

  Args:
    mesh: the mesh.
    boxed_params: parameters (or their shapes) boxed by `nn.with_partitioning`, as from
      `init_params`.

  Returns:
    A pytree like the unboxed parameters.
  """

  one = lambda box: NamedSharding(mesh, PartitionSpec(*_axes(mesh, box.value.shape, box.names)))
  return jax.tree.map(one, boxed_params, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def gather_weight(mesh: Mesh | None, weight: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
  """A weight as it multiplies rows: gathered over the mesh axes that the rows are split over.

  Left to itself the compiler may do the converse: leave the weight where it is, gather the rows,
  and so hold the activations of all rows on every device.

  Args:
    mesh: the mesh; None leaves the weight as it is.
    weight: a parameter, or what it was cast to.
    names: logical names of its axes.
  """
  if mesh is None:
    return weight
  kept = _beside_rows(_axes(mesh, weight.shape, names))
  return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec(*kept)))


def spread_shardings(mesh: Mesh, boxed_params):
  """NamedShardings of parameters that multiply few rows again and again, as in decode.

  Matrices with an axis of "ffn" or "vocab" are split along it over all devices that hold a part,
  and along no other: a device then gives or takes its own channels for all rows, and what is sent
  are rows of the model's width. Split along the width each would have a summand of all channels;
  that is left where the devices do not divide the channels.
  The others, of attention, norms and biases, are whole but for `tensor`, since queries meet the
  keys of their own rows: gathered once, they are not gathered anew at every step.

  Args:
    mesh: the mesh.
    boxed_params: as in `param_shardings`.

  Returns:
    A pytree like the unboxed parameters.
  """
  parts = mesh.shape["fsdp"] * mesh.shape["tensor"]

  def one(box):
    shape = box.value.shape
    spec = _axes(mesh, shape, box.names)
    (channels,) = [i for i, name in enumerate(box.names) if name in ("ffn", "vocab")] or [None]
    if channels is None:
      spec = _beside_rows(spec)
    elif shape[channels] % parts == 0:
      spec = [SPREAD if i == channels else None for i in range(len(shape))]
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(one, boxed_params, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def gather_rows(mesh: Mesh | None, x: jax.Array) -> jax.Array:
  """Rows as they meet weights of `spread_shardings`: on each device that holds a part of those."""
  return x if mesh is None else _pin_leading_axis(x, mesh, _BESIDE_SPREAD)


def split_channels(mesh: Mesh | None, x: jax.Array) -> jax.Array:
  """What such a weight gives for these rows, where it is made: split along the last axis."""
  if mesh is None or x.shape[-1] % (mesh.shape["fsdp"] * mesh.shape["tensor"]):
    return x
  spec = PartitionSpec(_BESIDE_SPREAD, *[None] * (x.ndim - 2), SPREAD)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def split_rows(mesh: Mesh | None, x: jax.Array) -> jax.Array:
  """Rows as they are otherwise: each on one device alone, but for the tensor axis."""
  return x if mesh is None else _pin_leading_axis(x, mesh, ROWS)


def _beside_rows(axes: Sequence[str | None]) -> list[str | None]:
  """The mesh axes that are left when those that rows are split over are gathered."""
  return [None if axis in ROWS else axis for axis in axes]


def _axes(mesh: Mesh, shape: tuple[int, ...], names: tuple[str | None, ...]) -> list[str | None]:
  """The mesh axis of each axis of a parameter."""
  axes = [PARAM_RULES.get(name) for name in names]
  fits = lambda size, axis: axis is not None and size % mesh.shape[axis] == 0
  return [axis if fits(size, axis) else None for size, axis in zip(shape, axes, strict=True)]
