"""A checkpoint comes back bit for bit or not at all."""

import asyncio
import importlib.util
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.errors import UserError
from spo_jax.infra.checkpoints import Checkpoints, Counters
from spo_jax.infra.mesh import make_mesh

RECORD = {
  "counters": {"iteration": 3, "elapsed_s": 0.1},
  "text": "ρ",
  "nothing": None,
  "big": 2**60,
}


def arrays(scale=1.0):
  rng = np.random.default_rng(0)
  weights = rng.standard_normal((64, 16)).astype(np.float32)
  weights[0, :3] = np.nan, -0.0, np.inf
  return {
    "params": {"w": jnp.asarray(weights) * scale, "b": jnp.arange(7, dtype=jnp.bfloat16)},
    "step": jnp.int32(5),
    "moments": (jnp.asarray(weights[:, :4]), jnp.zeros(3)),
  }


HOST_ARRAYS = {
  "tokens": np.arange(100_000, dtype=np.int32) * 7 % 1000,
  "offsets": np.array([0, 2**40]),
  "waiting": np.array([True, False]),
  "nothing": np.zeros((0, 3), np.float32),
  "number": np.float32(np.nan),
}


def bits(tree):
  return [
    (x.dtype, x.shape, np.ascontiguousarray(x).tobytes())
    for x in jax.tree.leaves(jax.device_get(tree))
  ]


@pytest.fixture
def folder(tmp_path):
  """A folder with checkpoints 1 and 2, of other arrays."""
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
  checkpoints.save(1, arrays(-1.0), {"step": 1})
  checkpoints.save(2, arrays(), RECORD)
  checkpoints.close()
  return tmp_path / "checkpoints"


def test_what_is_saved_comes_back_bit_for_bit(folder):
  checkpoints = Checkpoints(folder, keep=2)
  assert checkpoints.latest() == 2
  like = jax.tree.map(jnp.zeros_like, arrays())
  restored, record = checkpoints.restore(2, like)
  assert jax.tree.structure(restored) == jax.tree.structure(like)
  assert bits(restored) == bits(arrays())
  assert record == RECORD and json.dumps(record) == json.dumps(RECORD)
  assert bits(checkpoints.restore(1, like)[0]) == bits(arrays(-1.0))
  checkpoints.close()


def test_host_arrays_of_shapes_that_change_come_back_bit_for_bit(tmp_path):
  shorter = {"tokens": np.arange(3), "nothing": np.ones(2)}
  saved = {1: HOST_ARRAYS, 2: shorter, 3: {"nothing": np.zeros(0)}, 4: {}}
  checkpoints = Checkpoints(tmp_path, keep=4)
  for step, host_arrays in saved.items():
    checkpoints.save(step, {"w": jnp.full(3, step)}, {"step": step}, host_arrays)
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path, keep=4)
  for step, host_arrays in saved.items():
    restored = checkpoints.restore_host_arrays(step)
    assert restored.keys() == host_arrays.keys()
    assert bits(restored) == bits(host_arrays)
    assert checkpoints.restore(step, {"w": jnp.zeros(3, jnp.int32)})[1] == {"step": step}
  checkpoints.close()


def test_a_checkpoint_without_host_arrays_has_no_trace_of_them(folder):
  names = {p.name for p in (folder / "2").iterdir()}
  assert names == {"_CHECKPOINT_METADATA", "arrays", "commit_success.txt", "record"}
  metadata = json.loads((folder / "2" / "_CHECKPOINT_METADATA").read_text())
  assert metadata["item_handlers"].keys() == {"arrays", "record"}
  checkpoints = Checkpoints(folder, keep=2)
  with pytest.raises(UserError, match="cannot be read") as error:
    checkpoints.restore_host_arrays(2)
  assert_one_line(error.value, folder)
  checkpoints.close()


def test_arrays_come_back_split_as_asked(tmp_path):
  before, after = make_mesh(2, 2, 2), make_mesh(1, 8, 1)
  place = lambda mesh, *spec: NamedSharding(mesh, PartitionSpec(*spec))
  tree = jax.device_put(arrays()["params"], place(before))
  tree["w"] = jax.device_put(tree["w"], place(before, "fsdp", "tensor"))
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, tree, {})
  checkpoints.wait()
  shardings = {"w": place(after, "fsdp", None), "b": place(after)}
  like = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )
  for like_of, want in ((tree, {k: v.sharding for k, v in tree.items()}), (like, shardings)):
    restored, _ = checkpoints.restore(1, like_of)
    assert bits(restored) == bits(tree)
    for name, sharding in want.items():
      assert restored[name].sharding.is_equivalent_to(sharding, restored[name].ndim)
  checkpoints.close()


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1)
  tree = {"w": jnp.arange(1 << 16, dtype=jnp.float32)}
  want = bits(tree)
  checkpoints.save(1, tree, {})
  overwritten = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)(tree)
  checkpoints.wait()
  assert bits(checkpoints.restore(1, overwritten)[0]) == want
  checkpoints.close()


def test_the_newest_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  assert checkpoints.latest() is None
  for step in (1, 5, 7, 12):
    checkpoints.save(step, {"w": jnp.full(3, step)}, {"step": step})
  checkpoints.wait()
  assert checkpoints.latest() == 12
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["12", "7"]


def test_the_best_are_kept_beside_the_newest(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2, keep_best=1)
  for step, score in ((1, 0.3), (2, None), (3, 0.6), (4, None), (5, 0.5), (6, None)):
    checkpoints.save(step, {"w": jnp.full(3, step)}, {}, score=score)
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5", "6"]


def test_the_newest_whole_checkpoint_is_read_and_damaged_ones_are_set_aside(folder):
  (folder / "2" / "record" / "metadata").write_text("{")
  told = []
  checkpoints = Checkpoints(folder, keep=2)
  like = jax.tree.map(jnp.zeros_like, arrays())
  found, record = checkpoints.read_newest(lambda step: checkpoints.restore(step, like), told.append)
  assert record == {"step": 1} and bits(found) == bits(arrays(-1.0))
  assert len(told) == 1 and "2 cannot be read" in told[0] and "resuming from 1" in told[0]
  assert checkpoints.latest() == 1 and (folder.parent / "checkpoints_damaged" / "2").is_dir()
  checkpoints.save(2, arrays(), RECORD)
  checkpoints.wait()
  assert checkpoints.latest() == 2
  checkpoints.close()


def test_if_none_can_be_read_nothing_is_moved(folder):
  for step in ("1", "2"):
    (folder / step / "record" / "metadata").write_text("{")
  checkpoints = Checkpoints(folder, keep=2)
  like = jax.tree.map(jnp.zeros_like, arrays())
  with pytest.raises(UserError, match="2 cannot be read") as error:
    checkpoints.read_newest(lambda step: checkpoints.restore(step, like), pytest.fail)
  assert_one_line(error.value, folder)
  checkpoints.close()
  assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_bucket_without_its_package_is_told():
  if importlib.util.find_spec("gcsfs") is not None:
    pytest.skip("gcsfs is installed, and would ask for the bucket")
  with pytest.raises(UserError, match="cannot be kept in gs://bucket/run: .*install gcsfs"):
    Checkpoints("gs://bucket/run", keep=1)


def test_where_nothing_can_be_written_is_told(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="checkpoints cannot be kept in") as error:
    Checkpoints(tmp_path / "file" / "checkpoints", keep=1)
  assert "\n" not in str(error.value)


def test_what_a_killed_process_left_half_written_is_removed(folder):
  torn = folder / "3.orbax-checkpoint-tmp"
  shutil.copytree(folder / "2", torn)
  shutil.rmtree(torn / "record")
  checkpoints = Checkpoints(folder, keep=2)
  assert checkpoints.latest() == 2
  checkpoints.save(4, arrays(), {"step": 4})
  checkpoints.close()
  assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]


def restore(folder, like):
  checkpoints = Checkpoints(folder, keep=2)
  try:
    return checkpoints.restore(2, like)
  finally:
    checkpoints.close()


def assert_one_line(error, folder):
  assert "\n" not in str(error)
  assert str(folder / "2") in str(error)


def halve(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


DAMAGES = {
  "halved": halve,
  "emptied": lambda path: path.write_bytes(b""),
  "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
  "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_or_does_not_matter(folder, tmp_path, damage):
  """Every file of a checkpoint in turn: an error that names the folder, or the exact data."""
  like, want = jax.tree.map(jnp.zeros_like, arrays()), bits(arrays())
  files = [p.relative_to(folder) for p in (folder / "2").rglob("*") if p.is_file()]
  told = set()
  for number, name in enumerate(files):
    copy = tmp_path / str(number)
    shutil.copytree(folder, copy)
    DAMAGES[damage](copy / name)
    try:
      restored, record = restore(copy, like)
    except UserError as error:
      assert_one_line(error, copy)
      told.add(name.parts[1] if len(name.parts) < 4 else "data")
    else:
      assert bits(restored) == want and record == RECORD, name
  assert told == {"arrays", "record", "data"}


@pytest.mark.parametrize("damage", [*DAMAGES, "flipped"])
def test_damaged_host_arrays_are_told_or_come_back(folder, tmp_path, damage):
  checkpoints = Checkpoints(folder, keep=2)
  checkpoints.save(3, arrays(), RECORD, HOST_ARRAYS)
  checkpoints.close()
  part = folder / "3" / "host_arrays"
  told = set()
  for number, name in enumerate([p.relative_to(part) for p in part.rglob("*") if p.is_file()]):
    copy = tmp_path / str(number)
    shutil.copytree(folder, copy)
    (DAMAGES | {"flipped": flip})[damage](copy / "3" / "host_arrays" / name)
    checkpoints = Checkpoints(copy, keep=2)
    try:
      restored = checkpoints.restore_host_arrays(3)
    except UserError as error:
      assert "\n" not in str(error) and str(copy / "3") in str(error)
      told.add("data" if "d" in name.parts else name.name)
    else:
      assert bits(restored) == bits(HOST_ARRAYS), name
    finally:
      checkpoints.close()
  assert "data" in told


def test_one_array_that_cannot_be_read_does_not_cut_the_others_short(folder, monkeypatch):
  """TensorStore answers from other threads, which must find the loop open."""
  answers = []

  async def fails():
    raise ValueError("this array is damaged")

  async def is_slow():
    answers.append(await asyncio.to_thread(lambda: time.sleep(0.1)))

  async def all_arrays():
    await asyncio.gather(is_slow(), fails())

  def restore(*_, **__):  # as Orbax does it
    loop = asyncio.new_event_loop()
    try:
      loop.run_until_complete(all_arrays())
    finally:
      loop.close()

  policy = asyncio.get_event_loop_policy()
  monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
  checkpoints = Checkpoints(folder, keep=1)
  with pytest.raises(UserError, match="this array is damaged"):
    checkpoints.restore_host_arrays(1)
  assert answers == [None]
  assert asyncio.get_event_loop_policy() is policy
  checkpoints.close()


def test_a_folder_of_nothing_and_a_missing_part_are_told(folder):
  for part in ("record", "arrays"):
    shutil.rmtree(folder / "2" / part)
    with pytest.raises(UserError, match="cannot be read") as error:
      restore(folder, arrays())
    assert_one_line(error.value, folder)


@pytest.mark.parametrize(
  "other",
  [
    lambda t: t | {"params": {"w": jnp.zeros((64, 18)), "b": t["params"]["b"]}},
    lambda t: t | {"params": {"w": jnp.zeros((64, 8)), "b": t["params"]["b"]}},
    lambda t: t | {"params": {"w": t["params"]["w"]}},
    lambda t: t | {"params": {"w": t["params"]["w"], "c": t["params"]["b"]}},
    lambda t: t | {"more": jnp.zeros(3)},
  ],
)
def test_a_checkpoint_of_another_model_is_told(folder, other):
  with pytest.raises(UserError, match="of another model") as error:
    restore(folder, other(arrays()))
  assert_one_line(error.value, folder)


def test_counters_survive_json():
  counters = Counters(iteration=3, tokens_sampled=2**40, tokens_trained=7, elapsed_s=0.1)
  assert Counters(**json.loads(json.dumps(vars(counters)))) == counters
