import json
import pathlib
import types

import numpy as np
import pytest
import transformers

from spo_jax.data import arithmetic, tokenizer
from spo_jax.errors import UserError


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
  return tokenizer.load_tokenizer("", work_dir=str(tmp_path_factory.mktemp("tokenizer")))


def texts_of_task():
  for filler in (False, True):
    for example in arithmetic.make_examples("train", 2000, filler=filler):
      yield from (example.question, example.solution)


def test_round_trip(embedded):
  texts = list(texts_of_task())
  ids = embedded(texts)["input_ids"]
  assert embedded.batch_decode(ids) == texts
  used = {i for row in ids for i in row}
  assert embedded.unk_token_id not in used
  # Every ordinary token has a use in the task.
  assert used == set(range(len(tokenizer.SPECIAL_TOKENS), len(embedded)))


def test_tokens_of_a_solution(embedded):
  text = "19-9=10;so well 2*4=8;#13"
  tokens = [*"19-9=10;", "so", "well", *"2*4=8;#13"]
  assert embedded.tokenize(text) == tokens


def test_decoding_skips_special_tokens_on_request(embedded):
  ids = embedded("2*4=8;#8")["input_ids"]
  padded = [*ids, embedded.eos_token_id, embedded.pad_token_id]
  assert embedded.decode(padded, skip_special_tokens=True) == "2*4=8;#8"


def test_vocabulary(embedded):
  assert embedded.pad_token_id == 0
  assert [embedded.eos_token_id, embedded.bos_token_id, embedded.unk_token_id] == [1, 2, 3]
  assert embedded.get_vocab() == tokenizer.vocabulary()
  assert sorted(embedded.get_vocab().values()) == list(range(len(embedded)))
  assert embedded("ann has qqq pens")["input_ids"].count(embedded.unk_token_id) == 1


def test_auto_tokenizer_loads_the_folder(embedded, tmp_path):
  tokenizer.build_tokenizer(tmp_path / "built")
  auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "built", local_files_only=True)
  ours = tokenizer.load_tokenizer(str(tmp_path / "built"), work_dir="")
  text = next(texts_of_task())
  for other in (auto, ours):
    assert other(text)["input_ids"] == embedded(text)["input_ids"]
    assert other.decode(other(text)["input_ids"]) == text
    assert (other.pad_token_id, other.eos_token_id) == (0, 1)
  tokenizer.build_tokenizer(tmp_path / "again")
  files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("built", "again")]
  assert files[0] == files[1]


def test_embedded_tokenizer_is_built_once_and_whole(tmp_path, monkeypatch):
  work_dir = tmp_path / "work"
  tokenizer.load_tokenizer("", work_dir=str(work_dir))
  (folder,) = work_dir.iterdir()
  assert folder.name.startswith("arithmetic-tokenizer-")

  def fail(path):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text("{")
    raise KeyboardInterrupt

  monkeypatch.setattr(tokenizer, "build_tokenizer", fail)
  tokenizer.load_tokenizer("", work_dir=str(work_dir))  # Not built again.
  with pytest.raises(KeyboardInterrupt):
    tokenizer.load_tokenizer("", work_dir=str(tmp_path / "other"))
  assert not list((tmp_path / "other").iterdir())


def test_embedded_tokenizer_survives_a_race(tmp_path, monkeypatch):
  build = tokenizer.build_tokenizer

  def lose_race(path):
    monkeypatch.setattr(tokenizer, "build_tokenizer", build)
    tokenizer.load_tokenizer("", work_dir=str(tmp_path))  # Another process finishes first.
    build(path)

  monkeypatch.setattr(tokenizer, "build_tokenizer", lose_race)
  assert tokenizer.load_tokenizer("", work_dir=str(tmp_path)).pad_token_id == 0
  assert len(list(tmp_path.iterdir())) == 1


def test_unusable_folders(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    tokenizer.load_tokenizer(str(tmp_path / "nowhere"), work_dir="")
  for name, content in {"config.json": {}, "tokenizer.json": {"version": "1.0"}}.items():
    folder = pathlib.Path(tmp_path / name.replace(".", "_"))
    folder.mkdir()
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match="no tokenizer") as error:
      tokenizer.load_tokenizer(str(folder), work_dir="")
    assert "\n" not in str(error.value)


def test_check_tokenizer(embedded):
  size = len(embedded)
  tokenizer.check_tokenizer(embedded, size)
  tokenizer.check_tokenizer(embedded, np.int64(size + 1))
  with pytest.raises(UserError, match=f"at least {size}"):
    tokenizer.check_tokenizer(embedded, size - 1)
  lacking = types.SimpleNamespace(get_vocab=embedded.get_vocab, eos_token_id=None)
  with pytest.raises(UserError, match="no eos token"):
    tokenizer.check_tokenizer(lacking, size)


def test_a_tokenizer_without_padding_pads_with_its_end(embedded, tmp_path):
  embedded.save_pretrained(tmp_path)
  path = tmp_path / "tokenizer_config.json"
  config = json.loads(path.read_text())
  del config["pad_token"]
  path.write_text(json.dumps(config))
  loaded = tokenizer.load_tokenizer(str(tmp_path), work_dir="")
  assert loaded.pad_token_id == loaded.eos_token_id == embedded.eos_token_id
