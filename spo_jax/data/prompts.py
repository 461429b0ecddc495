"""From a question to the tokens that a policy continues: templates, BOS, what ends a response."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from spo_jax.errors import UserError

QUESTION = "{question}"
CHAT = "chat"  # the tokenizer's own chat template

# Templates of AIFrameResearch/SPO, configs/prompt_library, after its str.format; where a template
# begins with BOS it says so itself.
_R1_BEGIN = "<｜begin▁of▁sentence｜>"
TEMPLATES = {
  "plain": QUESTION,
  # MATH_step_by_step_sft and qwen_base: Rho-1.1B, DeepSeekMath-7B and Qwen2.5-1.5B.
  "math_task": f"[MATH_TASK] Problem:\n{QUESTION}\n\nSolution:",
  # qwen_MATH: DeepSeek-R1-Distill-Qwen.
  "r1_math": (
    f"{_R1_BEGIN}<｜User｜>Solve the following math problem efficiently and clearly.  The last "
    "line of your response should be of the following format: 'Therefore, the final answer is: "
    "$\\boxed{ANSWER}$. I hope it is correct' (without quotes) where ANSWER is just the final "
    "number or expression that solves the problem. Think step by step before answering.\n\n"
    f"{QUESTION}<｜Assistant｜><think>\n"
  ),
  # qwen_gsm8k: there with Qwen2.5-0.5B-Instruct, to which the signs of R1 are ordinary text.
  "r1_gsm8k": (
    f"{_R1_BEGIN}<｜User｜>Solve the following math problem efficiently and clearly. The last line "
    "of your response should be of the following format: 'Therefore, the final answer is: "
    "#### ANSWER. I hope it is correct' (without quotes) where ANSWER is just the final "
    "number or expression that solves the problem. Think step by step before answering.\n\n"
    f"{QUESTION}<｜Assistant｜>"
  ),
  # qwen_point24: DeepSeek-R1-Distill-Qwen.
  "r1_game24": (
    f"{_R1_BEGIN}You are an intelligent system that calculates 24 point games, put your final "
    "calculation expression into \\boxed{}, for example \\boxed{1 * 2 * 3 * 4}."
    f"<｜User｜>{QUESTION}<｜Assistant｜><think>\n"
  ),
}


@dataclasses.dataclass(frozen=True)
class Template:
  """What stands around a question: a text with `{question}`, or `chat`.

  `system` is the system turn of a chat; "" is none.
  """

  text: str = QUESTION
  system: str = ""

  def render(self, tokenizer, question: str) -> str:
    """The prompt as text, special tokens included where the template writes them.

    Raises:
      UserError: if the tokenizer has no chat template, or the template refuses the turns.
    """
    if self.text == CHAT:
      return _render_chat(tokenizer, self.turns(question), add_generation_prompt=True)
    # Not str.format: questions and templates are full of braces.
    return self.text.replace(QUESTION, question)

  def turns(self, question: str) -> list[dict[str, str]]:
    """The chat that asks a question."""
    system = [{"role": "system", "content": self.system}] if self.system else []
    return [*system, {"role": "user", "content": question}]


PLAIN = Template()


def parse_template(name: str, system: str) -> Template:
  """The template of a config: a key of `TEMPLATES`, `chat`, or a text that contains `{question}`.

  Raises:
    UserError: if it is none of these, or a system turn is given without a chat.
  """
  if system and name != CHAT:
    raise UserError(f"config.data.system is used by the template '{CHAT}' alone, not by '{name}'")
  if name != CHAT and name not in TEMPLATES and QUESTION not in name:
    known = ", ".join((*TEMPLATES, CHAT))
    raise UserError(
      f"config.data.template is {name!r}, it must be one of: {known}; or contain {QUESTION}"
    )
  return Template(TEMPLATES.get(name, name), system)


def token_ids(tokenizer, template: Template, questions: Sequence[str]) -> list[list[int]]:
  """Token ids of prompts.

  BOS stands before a prompt once: where the template or the chat template writes it, it is not
  added; otherwise it is where the tokenizer puts one before any text of its own accord. A chat
  template is taken at its word. Nothing is added behind a prompt, whatever the tokenizer's habit.

  Raises:
    UserError: as `Template.render`.
  """
  if not questions:
    return []
  texts = [template.render(tokenizer, question) for question in questions]
  rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
  bos = [] if template.text == CHAT else _leading_bos(tokenizer)
  return [row if row[: len(bos)] == bos else [*bos, *row] for row in rows]


def end_id(tokenizer, template: Template) -> int:
  """The token that ends a response, and that a policy is trained to emit.

  It is what the chat template puts behind an assistant's turn (`<end_of_turn>` in Gemma, whose
  end-of-text token is another), else the tokenizer's end-of-text token.

  Raises:
    UserError: as `Template.render`.
  """
  if template.text != CHAT:
    return tokenizer.eos_token_id
  said = "ANSWER"
  turns = [*template.turns("QUESTION"), {"role": "assistant", "content": said}]
  behind = _render_chat(tokenizer, turns, add_generation_prompt=False).rpartition(said)[2]
  ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
  if ids and ids[0] in tokenizer.added_tokens_decoder:
    return ids[0]
  return tokenizer.eos_token_id


def stop_ids(tokenizer, template: Template, directory: str) -> tuple[int, ...]:
  """All tokens at which a response ends; the first is `end_id`.

  Args:
    tokenizer: A Hugging Face tokenizer.
    template: The prompt's template.
    directory: The tokenizer's folder, whose `generation_config.json` may list several; "" for the
      embedded task's.

  Raises:
    UserError: if that file cannot be read or lists something else than ids.
  """
  ids = [end_id(tokenizer, template), tokenizer.eos_token_id]
  path = pathlib.Path(directory) / "generation_config.json"
  if directory and path.is_file():
    try:
      listed = json.loads(path.read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
      raise UserError(f"'{path}' is no generation config: {error}") from error
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(i) is int for i in listed):
      raise UserError(f"'{path}' has the eos_token_id {listed}, it must be one id or a list of ids")
    ids += listed
  return tuple(dict.fromkeys(ids))


def _leading_bos(tokenizer) -> list[int]:
  """`[bos]` if the tokenizer begins any text with it by itself, else nothing."""
  bos = tokenizer.bos_token_id
  return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _render_chat(tokenizer, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
  if not tokenizer.chat_template:
    raise UserError(
      f"config.data.template is '{CHAT}', but the tokenizer has no chat template: use another "
      "template or the tokenizer of a chat model"
    )
  try:
    return tokenizer.apply_chat_template(
      turns, tokenize=False, add_generation_prompt=add_generation_prompt
    )
  except Exception as error:  # The template is anyone's program, and raises what it likes.
    roles = ", ".join(turn["role"] for turn in turns)
    reason = " ".join(str(error).split())
    raise UserError(f"the chat template refuses the turns {roles}: {reason}") from error
