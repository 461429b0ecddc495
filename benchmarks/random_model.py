"""A random model of a real architecture with a tokenizer built from data, in Hugging Face format.

  python -m benchmarks.random_model --family=qwen2 --layers=8 --width=512 --data=DIR --out=DIR

What `--config.model` takes, where no weights can be had: it shows that everything runs. The
tokenizer is byte-level BPE with digits of their own, learnt from the texts of all `*.jsonl` below
the data folder.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import transformers
from flax import linen as nn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from spo_jax.data.json_lines import read_rows
from spo_jax.errors import UserError
from spo_jax.models.decoder import count_params, init_params
from spo_jax.models.export import check_export, export_model
from spo_jax.models.families import FAMILIES, config_from_hf

FIELDS = ("question", "problem", "solution", "answer")  # of GSM8K, MATH and one's own JSON lines
EOS, PAD = "<|endoftext|>", "<|pad|>"
CONTEXT = 4096  # positions that config.json tells of
MOST_HEAD_DIM = 64
FFN_RATIO = 3  # feed-forward channels a channel of the model


def read_texts(data: pathlib.Path, fields: Sequence[str] = FIELDS) -> Iterator[str]:
  """The texts of these fields in all JSON lines below a folder.

  Raises:
    UserError: if there are none, or a file cannot be read.
  """
  files = sorted(data.rglob("*.jsonl"))
  found = 0
  for file in files:
    for row in read_rows(file):
      for text in filter(None, map(row.optional, fields)):
        found += 1
        yield text
  if not found:
    raise UserError(
      f"'{data}' has no *.jsonl with texts in the fields {', '.join(fields)}: name others with "
      "--fields"
    )


def build_tokenizer(texts: Iterator[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
  """Byte-level BPE learnt from texts: any text can be encoded, and decodes to itself.

  Args:
    texts: what to learn from.
    vocab_size: most tokens; short texts give fewer.
  """
  backend = Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[EOS, PAD],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    eos_token=EOS,
    pad_token=PAD,
    clean_up_tokenization_spaces=False,
  )


def model_config(
  family: str, layers: int, width: int, vocab_size: int, **token_ids: int | None
) -> dict[str, Any]:
  """A family's config.json; heads have 64 channels, or half the width, and two share their keys.

  Args:
    family: a key of `families.FAMILIES`.
    layers: blocks.
    width: channels, a multiple of 128 or, below, of 4.
    vocab_size: tokens.
    **token_ids: special ones, such as `eos_token_id`.

  Raises:
    UserError: if the width cannot be divided so.
  """
  head_dim = min(MOST_HEAD_DIM, width // 2)
  if width % (2 * head_dim) or head_dim % 2:
    raise UserError(f"--width {width} must be a multiple of {2 * MOST_HEAD_DIM}, or of 4 below it")
  config = transformers.AutoConfig.for_model(
    family,
    vocab_size=vocab_size,
    hidden_size=width,
    intermediate_size=FFN_RATIO * width,
    num_hidden_layers=layers,
    num_attention_heads=width // head_dim,
    num_key_value_heads=width // head_dim // 2,
    head_dim=head_dim,
    max_position_embeddings=CONTEXT,
    architectures=[FAMILIES[family].architecture],
    dtype="float32",
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | token_ids,
  )
  return json.loads(config.to_json_string())


def write_model(
  folder: pathlib.Path,
  texts: Iterator[str],
  *,
  family: str,
  layers: int,
  width: int,
  vocab_size: int,
  seed: int,
) -> int:
  """Writes the folder: config.json, model.safetensors, tokenizer.

  Returns:
    The number of parameters.

  Raises:
    UserError: as `read_texts` and `model_config`, or if the folder exists.
  """
  check_export(folder)
  tokenizer = build_tokenizer(texts, vocab_size)
  ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
  hf = model_config(family, layers, width, len(tokenizer), **ids)
  cfg = config_from_hf(hf)
  params = jax.jit(lambda key: nn.unbox(init_params(cfg, key)))(jax.random.key(seed))
  export_model(params, cfg, hf, tokenizer, folder)
  return count_params(params)


def main() -> int:
  """Writes a folder and tells its size; a mistake is told in one line, with exit status 2."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--family", choices=sorted(FAMILIES), default="qwen2")
  parser.add_argument("--layers", type=int, default=8)
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--vocab_size", type=int, default=4096, help="most tokens")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of JSON lines")
  parser.add_argument("--fields", nargs="+", default=FIELDS, help="their fields with text")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder that does not exist")
  args = parser.parse_args()
  try:
    parameters = write_model(
      args.out.absolute(),
      read_texts(args.data, args.fields),
      family=args.family,
      layers=args.layers,
      width=args.width,
      vocab_size=args.vocab_size,
      seed=args.seed,
    )
  except UserError as error:
    print(f"random_model: {error}", file=sys.stderr)
    return 2
  print(f"{args.out}: {args.family}, {parameters / 1e6:.1f} M parameters")
  return 0


if __name__ == "__main__":
  sys.exit(main())
