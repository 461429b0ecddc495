"""Small tokenizers with the habits of real ones, for tests."""

import tokenizers
import transformers

SPECIAL = ("<pad>", "<s>", "</s>", "<turn>", "<end_turn>")
PAD, BOS, EOS, TURN, END_TURN = range(len(SPECIAL))


def make_tokenizer(*, adds=("<s>",), adds_behind=(), chat_template=None):
  """A tokenizer of single bytes that puts `adds` before a text and `adds_behind` behind it."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single=[*adds, "$A", *adds_behind],
    special_tokens=[(token, SPECIAL.index(token)) for token in (*adds, *adds_behind)],
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token="<pad>",
    bos_token="<s>",
    eos_token="</s>",
    extra_special_tokens=["<turn>", "<end_turn>"],
  )
  tokenizer.chat_template = chat_template
  return tokenizer
