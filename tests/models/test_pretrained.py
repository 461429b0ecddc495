"""Checkpoints on disk: read as written, placed as the mesh wants, damage named."""

import shutil
from fnmatch import fnmatch

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spo_jax.errors import UserError
from spo_jax.infra.mesh import make_mesh
from spo_jax.models.export import export_model, llama_config
from spo_jax.models.families import Transform, config_from_hf, from_hf, parameter_table, to_hf
from spo_jax.models.pretrained import check_tensors, find_pretrained, hf_sharding, load_params
from tests.byte_tokenizer import make_tokenizer
from tests.tiny import shard_params, tiny_config, tiny_params

CFG = tiny_config()
HF = llama_config(CFG, 64, make_tokenizer())
READ_CFG = config_from_hf(HF)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint in several files."""
  path = tmp_path_factory.mktemp("checkpoints") / "model"
  export_model(tiny_params(CFG), CFG, HF, make_tokenizer(), path, shard_bytes=5000)
  return path


def edited(folder, tmp_path, edit):
  """A copy of the checkpoint in one file, with its dictionary of tensors edited."""
  tensors = {}
  for file in folder.glob("*.safetensors"):
    tensors |= load_file(file)
  shutil.copytree(folder, tmp_path, ignore=shutil.ignore_patterns("model*"), dirs_exist_ok=True)
  edit(tensors)
  save_file(tensors, tmp_path / "model.safetensors")
  return tmp_path


def load(folder, mesh=None):
  found = find_pretrained(str(folder))
  return load_params(found, config_from_hf(found.hf), mesh or make_mesh(1, 1, 1))


def test_what_is_written_in_several_files_is_read_back(folder):
  assert len(list(folder.glob("*.safetensors"))) > 3
  jax.tree.map(np.testing.assert_array_equal, load(folder), tiny_params(CFG))
  assert READ_CFG.layers == CFG.layers and READ_CFG.layer_kinds[0].rope.theta == 1e4


def test_parameters_lie_where_the_mesh_wants_them(folder):
  mesh = make_mesh(2, 2, 2)
  params = load(folder, mesh)
  want = shard_params(CFG, mesh, tiny_params(CFG))

  def same(got, wanted):
    assert got.sharding == wanted.sharding
    for a, b in zip(got.addressable_shards, wanted.addressable_shards, strict=True):
      assert a.device == b.device
      np.testing.assert_array_equal(a.data, b.data)

  jax.tree.map(same, params, want)
  assert not params["block_0"]["up"].sharding.is_fully_replicated


def test_a_device_reads_no_more_than_its_part():
  """What a device holds of a tensor is, transposed, what it holds of the parameter."""
  mesh = make_mesh(2, 2, 2)
  cfg = tiny_config(qkv_bias=True)
  params = shard_params(cfg, mesh, tiny_params(cfg))
  split = set()
  for path, (_, kind) in parameter_table(cfg).items():
    param = params
    for step in path:
      param = param[step]
    tensor = to_hf(kind, np.asarray(param))
    sharding = hf_sharding(kind, param.sharding)
    for shard in param.addressable_shards:
      part = tensor[sharding.devices_indices_map(tensor.shape)[shard.device]]
      np.testing.assert_array_equal(from_hf(kind, part, shard.data.shape), shard.data)
      if part.size < tensor.size:
        split.add(kind)
  assert split == set(Transform)


@pytest.mark.parametrize(
  "edit, message",
  [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj"),
    (
      lambda t: t.update({f"model.layers.{i}.x": np.zeros(1) for i in range(5)}),
      "does not account for, model.layers.0.x, model.layers.1.x, model.layers.2.x and 2 more",
    ),
    (
      lambda t: t.update({"lm_head.weight": np.zeros((33, 16), np.float32)}),
      r"in another shape lm_head.weight \[33, 16\] \(not \[32, 16\]\)",
    ),
    (
      lambda t: t.update({"model.norm.weight": np.zeros(16, np.int8)}),
      "in another dtype than bfloat16.*model.norm.weight I8|BF16, F16, F32 model.norm.weight I8",
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(folder, tmp_path, edit, message):
  found = find_pretrained(str(edited(folder, tmp_path, edit)))
  with pytest.raises(UserError, match=message) as error:
    check_tensors(found, READ_CFG)
  assert "\n" not in str(error.value)


def test_tensors_that_old_checkpoints_carry_are_passed_over(folder, tmp_path):
  inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
  found = find_pretrained(str(edited(folder, tmp_path, lambda tensors: tensors.update(inv_freq))))
  assert set(check_tensors(found, READ_CFG)) == {
    name for name, _ in parameter_table(READ_CFG).values()
  }
  tied = config_from_hf(HF | {"tie_word_embeddings": True})
  assert "lm_head.weight" not in check_tensors(found, tied)


def test_damaged_folders_are_named(folder, tmp_path, monkeypatch):
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  victim = sorted(copy.glob("*.safetensors"))[1]
  whole = victim.read_bytes()
  victim.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match=f"{victim.name}' is damaged"):
    load(copy)
  victim.unlink()
  with pytest.raises(UserError, match=f"has no {victim.name}"):
    load(copy)
  (copy / "model.safetensors.index.json").write_text("[]")
  with pytest.raises(UserError, match="is no index"):
    load(copy)
  (copy / "model.safetensors.index.json").unlink()
  with pytest.raises(UserError, match="has no model.safetensors"):
    load(copy)
  (copy / "config.json").write_text("{")
  with pytest.raises(UserError, match="is no JSON"):
    load(copy)
  (copy / "config.json").unlink()
  with pytest.raises(UserError, match="has no config.json"):
    load(copy)

  def unreachable(*args, **kwargs):
    raise OSError("no\nnetwork")

  monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
  with pytest.raises(UserError, match=r"could not be had from the hub \(no network\)"):
    find_pretrained("nobody/nothing")


def test_a_hub_id_is_read_from_where_it_was_downloaded(folder, monkeypatch):
  asked = []

  def download(name, allow_patterns):
    needed = ("config.json", "tokenizer.json", "chat_template.jinja", "vocab.json", "merges.txt")
    asked.append((name, all(any(fnmatch(f, p) for p in allow_patterns) for f in needed)))
    return str(folder)

  monkeypatch.setattr("huggingface_hub.snapshot_download", download)
  assert find_pretrained("somebody/model").folder == folder
  assert asked == [("somebody/model", True)]
