"""One mesh, and one table from logical axes to mesh axes: shardings are decided here alone."""

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spo_jax.errors import UserError

ROWS = ("data", "fsdp")  # mesh axes that the rows of batches, prefixes and caches are split over

# Logical axis of a parameter -> mesh axis. An axis that its mesh axis does not divide stays whole.
PARAM_RULES = {
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "ffn": "tensor",
  "width": "fsdp",
}


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
  """The mesh of the first data * fsdp * tensor devices; `data` of -1 takes all that are left.

  Raises:
    UserError: if the axes do not fit the number of devices.
  """
  devices = jax.devices()
  if data < -1 or min(abs(data), fsdp, tensor) < 1:
    raise UserError(
      f"mesh: data {data}, fsdp {fsdp}, tensor {tensor} must be positive (data: or -1)"
    )
  if data == -1:
    if len(devices) % (fsdp * tensor):
      raise UserError(
        f"mesh: fsdp {fsdp} x tensor {tensor} does not divide the {len(devices)} devices "
        "of this machine"
      )
    data = len(devices) // (fsdp * tensor)
  size = data * fsdp * tensor
  if size > len(devices):
    raise UserError(
      f"mesh: data {data} x fsdp {fsdp} x tensor {tensor} needs {size} devices, "
      f"this machine has {len(devices)}"
    )
  grid = np.asarray(devices[:size]).reshape(data, fsdp, tensor)
  return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def row_shards(mesh: Mesh) -> int:
  """Number of parts that rows are split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def row_sharding(mesh: Mesh) -> NamedSharding:
  """How the rows (axis 0) of arrays are split."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def shard_rows(mesh: Mesh, tree):
  """Puts arrays on the mesh, split over their rows."""
  return jax.device_put(tree, row_sharding(mesh))


def shard_batch(mesh: Mesh, batch):
  """Puts a batch of [M, B, ...] arrays on the mesh, split over B; arrays [M] go to every device."""
  spec = lambda x: PartitionSpec(None, ROWS) if x.ndim > 1 else PartitionSpec()
  return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), batch)


def param_shardings(mesh: Mesh, boxed_params):
  """NamedShardings of parameters from their logical axis names.

  Args:
    mesh: the mesh.
    boxed_params: parameters (or their shapes) boxed by `nn.with_partitioning`, as from
      `init_params`.

  Returns:
    A pytree like the unboxed parameters.
  """

  def one(box: nn.Partitioned) -> NamedSharding:
    spec = []
    for size, name in zip(box.value.shape, box.names, strict=True):
      axis = PARAM_RULES.get(name)
      spec.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(one, boxed_params, is_leaf=lambda x: isinstance(x, nn.Partitioned))
