"""What a run makes of its data: template, long prompts, what ends a response."""

import dataclasses
import json

import pytest
import tokenizers
import transformers

from spo_jax.config import ComputeConfig, Config, DataConfig
from spo_jax.errors import UserError
from spo_jax.models.export import export_model, llama_config
from spo_jax.run import delimiter_ids, make_run
from tests.byte_tokenizer import BOS, END_TURN, EOS, make_tokenizer
from tests.tiny import VOCAB, tiny_config, tiny_params


class Notes:
  """A progress that remembers what it was told."""

  def __init__(self):
    self.texts = []

  def note(self, text: str) -> None:
    self.texts.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Of a tokenizer without a chat template, whose model stops at two tokens."""
  path = tmp_path_factory.mktemp("tokenizer")
  make_tokenizer().save_pretrained(path)
  (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, END_TURN]}))
  return str(path)


def config(max_prompt_tokens, **data):
  rollout = dataclasses.replace(Config().rollout, max_prompt_tokens=max_prompt_tokens)
  return dataclasses.replace(Config(), rollout=rollout, data=DataConfig(**data))


def test_prompts_that_are_too_long_are_left_out_and_counted_once(folder, tmp_path):
  notes = Notes()
  template = "Make 24 of {question}:"
  settings = config(27, name="game24", tokenizer=folder, template=template)
  run = make_run(settings, tmp_path, notes)
  assert run.task.stop_ids == (EOS, END_TURN)
  assert run.sampler(temperature=1.0, as_rollout=False).stop_ids == (EOS, END_TURN)
  records = run.task.split("test")
  lengths = [len(template.replace("{question}", r["question"])) + 1 for r in records]  # and BOS
  assert 0 < len(records) < 136 and max(lengths) == 27
  assert run.task.split("test") is records
  assert notes.texts == [
    f"game24 test: {136 - len(records)} of 136 prompts have more than 27 tokens and are left out"
  ]
  prompts = run.task.prompts(records[:2], run.key("eval"), "id")
  assert prompts.tokens.shape == (2, 27) and prompts.lengths.tolist() == lengths[:2]
  assert prompts.tokens[0, 0] == BOS
  text = run.task.tokenizer.decode(prompts.tokens[0, : lengths[0]], skip_special_tokens=True)
  assert text == template.replace("{question}", records[0]["question"])


def test_a_chat_needs_a_chat_template(folder, tmp_path):
  with pytest.raises(UserError, match="the tokenizer has no chat template"):
    make_run(config(40, tokenizer=folder, template="chat"), tmp_path, Notes())


def test_a_model_smaller_than_its_tokenizer_is_refused(tmp_path):
  tokenizer = make_tokenizer()
  hf = llama_config(tiny_config(), 64, tokenizer)
  export_model(tiny_params(tiny_config()), tiny_config(), hf, tokenizer, tmp_path / "model")
  settings = dataclasses.replace(config(40, name="game24"), model=str(tmp_path / "model"))
  with pytest.raises(
    UserError, match=f"ids up to {len(tokenizer) - 1}, the model only {VOCAB} rows"
  ):
    make_run(settings, tmp_path, Notes())
  hf = {**hf, "num_attention_heads": 3}
  (tmp_path / "model" / "config.json").write_text(json.dumps(hf))
  with pytest.raises(UserError, match="num_attention_heads 3 must be a multiple"):
    make_run(settings, tmp_path, Notes())


def test_a_backend_that_the_device_lacks_is_refused(tmp_path):
  settings = dataclasses.replace(Config(), compute=ComputeConfig(attention="cudnn"))
  with pytest.raises(UserError, match="attention 'cudnn' needs an NVIDIA GPU, the device is a cpu"):
    make_run(settings, tmp_path, Notes())


def test_tokens_that_hold_a_delimiter():
  vocabulary = ["<unk>", ";", "a", "b;", ";c", "\n", "\n\n", ".\n", "a\nb", "ab", "; ;"]
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>")
  )
  backend.decoder = tokenizers.decoders.Fuse()
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
  assert delimiter_ids(tokenizer, ";") == (1, 3, 4, 10)
  assert delimiter_ids(tokenizer, "\n") == (5, 6, 7, 8)
  assert delimiter_ids(tokenizer, "\n\n") == (6,)
  with pytest.raises(UserError, match="delimiter '!' is in no token of the tokenizer"):
    delimiter_ids(tokenizer, "!")
  with pytest.raises(UserError, match="delimiter is empty"):
    delimiter_ids(tokenizer, "")


def test_a_delimiter_that_a_decoder_drops_at_the_beginning():
  """SentencePiece writes a space before every text, and its decoder takes one away."""
  pieces = ["<unk>", "\u2581", "\u2581the", "a", "<0x0A>"]
  model = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True)
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
  backend.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("\u2581", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(" ", 1, 0),
    ]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
  assert tokenizer.decode([2]) == "the"
  assert delimiter_ids(tokenizer, " ") == (1, 2)
  assert delimiter_ids(tokenizer, "\n") == (4,)
