"""Tokenizers: the embedded task's own, built from its word lists, and any from a folder."""

import hashlib
import os
import pathlib
import shutil
import tempfile

from spo_jax.data import arithmetic
from spo_jax.errors import UserError

PAD, EOS, BOS, UNK = SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
SIGNS = "+-*=;#.?"

# The decoder writes a space between any two tokens and then takes out those inside an expression
# and after an equation's end. Questions hold no two numbers side by side, so nothing else is lost.
_SPACES_TO_REMOVE = r"(?<=[0-9+*=;#-]) (?=[0-9+*=;#-])|(?<=;) "


def vocabulary() -> dict[str, int]:
  """Ids of the embedded tokenizer: special tokens (pad is 0), digits, signs, sorted words."""
  tokens = [*SPECIAL_TOKENS, *"0123456789", *SIGNS, *arithmetic.task_words()]
  return {token: i for i, token in enumerate(tokens)}


def build_tokenizer(directory: str | os.PathLike) -> None:
  """Writes the embedded task's tokenizer as a folder of the Hugging Face format.

  Tokens are words, single digits and signs. `decode(encode(text)) == text` for all texts of the
  task.
  """
  import tokenizers

  transformers = _import_transformers()
  model = tokenizers.models.WordLevel(vocabulary(), unk_token=UNK)
  tokenizer = tokenizers.Tokenizer(model)
  split_signs = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex(r"[+\-*=;#.?]"), behavior="isolated"
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.WhitespaceSplit(),
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      split_signs,
    ]
  )
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.WordPiece(prefix="##", cleanup=False),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Replace(tokenizers.Regex(_SPACES_TO_REMOVE), ""),
    ]
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token=PAD,
    eos_token=EOS,
    bos_token=BOS,
    unk_token=UNK,
    padding_side="right",
    clean_up_tokenization_spaces=False,
  ).save_pretrained(directory)


def load_tokenizer(directory: str, *, work_dir: str):
  """Loads a Hugging Face tokenizer from a folder, never from the network.

  Args:
    directory: A folder that holds a tokenizer, or "" for the embedded task's.
    work_dir: Folder in which the embedded tokenizer is built when it is not there yet.

  Raises:
    UserError: If the folder holds no tokenizer.
  """
  path = pathlib.Path(directory) if directory else _embedded_tokenizer(pathlib.Path(work_dir))
  if not path.is_dir():
    raise UserError(f"tokenizer folder '{path}' does not exist")
  transformers = _import_transformers()
  load = transformers.AutoTokenizer if directory else transformers.PreTrainedTokenizerFast
  try:
    tokenizer = load.from_pretrained(path, local_files_only=True)
  except (OSError, ValueError, KeyError) as error:
    reason = str(error).split("\n")[0]
    raise UserError(f"'{path}' holds no tokenizer that can be loaded: {reason}") from error
  if tokenizer.pad_token_id is None:
    # Llama's and Mistral's have none. Any token will do: what pads is never attended to.
    tokenizer.pad_token = tokenizer.eos_token
  return tokenizer


def check_tokenizer(tokenizer, vocab_size: int) -> None:
  """Checks that a tokenizer fits a model.

  Raises:
    UserError: If an id is outside the model's vocabulary, or the tokenizer lacks an end-of-text
      token.
  """
  largest = max(tokenizer.get_vocab().values())
  if largest >= vocab_size:
    raise UserError(
      f"the tokenizer has ids up to {largest}, the model only {vocab_size} rows: "
      f"use a vocab_size of at least {largest + 1} or the model's own tokenizer"
    )
  if tokenizer.eos_token_id is None:
    raise UserError("the tokenizer has no eos token: set eos_token in its tokenizer_config.json")


def _import_transformers():
  """The package transformers; it takes a second or more, so only who needs it pays."""
  # Only its tokenizers are used: that it finds no PyTorch is no news.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  return transformers


def _embedded_tokenizer(work_dir):
  """Path of the embedded tokenizer below a folder; built there unless it is there already."""
  digest = hashlib.sha256("\n".join([*vocabulary(), _SPACES_TO_REMOVE]).encode()).hexdigest()
  path = work_dir / f"arithmetic-tokenizer-{digest[:12]}"
  if path.is_dir():
    return path
  work_dir.mkdir(parents=True, exist_ok=True)
  # Built aside and renamed, so that a process killed halfway leaves nothing that looks complete.
  unfinished = pathlib.Path(tempfile.mkdtemp(dir=work_dir, prefix="incomplete-"))
  try:
    build_tokenizer(unfinished)
    unfinished.rename(path)
  except OSError:
    if not path.is_dir():
      raise
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
  return path
