"""Exported checkpoints: the dtypes of their source, nothing overwritten, nothing half done."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from spo_jax.config import Config
from spo_jax.errors import UserError
from spo_jax.infra.mesh import make_mesh
from spo_jax.models import export
from spo_jax.models.export import export_model, llama_config
from spo_jax.models.families import config_from_hf
from spo_jax.models.pretrained import find_pretrained, load_params
from spo_jax.run import new_decoder
from tests.byte_tokenizer import make_tokenizer
from tests.tiny import tiny_config, tiny_params

CFG = tiny_config()
HF = llama_config(CFG, 64, make_tokenizer())
READ_CFG = config_from_hf(HF)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint in one file."""
  path = tmp_path_factory.mktemp("checkpoints") / "model"
  export_model(tiny_params(CFG), CFG, HF, make_tokenizer(), path)
  return path


def test_all_users_may_read_what_is_written(folder):
  assert folder.stat().st_mode & 0o777 == 0o755
  assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_dtypes_of_the_source_are_kept(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "halves")
  source = find_pretrained(str(tmp_path / "halves"))
  halved = {
    name: tensor.astype(np.float32 if "norm" in name else ml_dtypes.bfloat16)
    for name, tensor in load_file(source.folder / "model.safetensors").items()
  }
  save_file(halved, source.folder / "model.safetensors")
  (source.folder / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
  params = load_params(source, READ_CFG, make_mesh(1, 1, 1))
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  export_model(params, READ_CFG, source.hf, make_tokenizer(), tmp_path / "again", source=source)
  after = load_file(tmp_path / "again" / "model.safetensors")
  assert halved.keys() == after.keys()
  for name, tensor in halved.items():
    assert after[name].dtype == tensor.dtype
    np.testing.assert_array_equal(after[name], tensor)
  assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == {
    "eos_token_id": [2, 4]
  }
  with safe_open(tmp_path / "again" / "model.safetensors", framework="np") as file:
    assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_other_processes_fetch_the_same_tensors_in_the_same_order_and_write_nothing(
  tmp_path, monkeypatch
):
  params, fetched = tiny_params(CFG), {}
  for first in (True, False):
    asked = fetched[first] = []
    fetch = lambda x, asked=asked: asked.append(x) or np.asarray(x)
    monkeypatch.setattr(export.hosts, "fetch", fetch)
    monkeypatch.setattr(export.hosts, "is_first", lambda first=first: first)
    export_model(params, CFG, HF, None, tmp_path / str(first))
  assert [id(x) for x in fetched[True]] == [id(x) for x in fetched[False]]
  assert len(fetched[True]) == len(jax.tree.leaves(params))
  assert [path.name for path in tmp_path.iterdir()] == ["True"]


def test_export_overwrites_nothing_and_leaves_nothing_half_done(folder, tmp_path, monkeypatch):
  with pytest.raises(UserError, match="exists already"):
    export_model(tiny_params(CFG), CFG, HF, make_tokenizer(), folder)

  def full_disk(*args, **kwargs):
    raise OSError("No space left on device")

  monkeypatch.setattr(export, "save_file", full_disk)
  with pytest.raises(OSError, match="No space"):
    export_model(tiny_params(CFG), CFG, HF, make_tokenizer(), tmp_path / "new" / "model")
  assert list((tmp_path / "new").iterdir()) == []


def test_a_new_decoder_is_read_back_with_its_geometry():
  config = Config()
  new = new_decoder(config.new_model, config.compute, vocab_size=60)
  again = config_from_hf(llama_config(new, 86, make_tokenizer()))
  for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn"):
    assert getattr(again, name) == getattr(new, name)
  assert again.norm_eps == new.norm_eps and again.tie_embeddings == new.tie_embeddings
  assert again.layer_kinds[0].rope.theta == new.layer_kinds[0].rope.theta
