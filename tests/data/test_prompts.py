import json

import numpy as np
import pytest

from spo_jax.data import prompts, source
from spo_jax.data.prompts import Template, parse_template, token_ids
from spo_jax.data.tokenizer import load_tokenizer
from spo_jax.errors import UserError
from tests.byte_tokenizer import BOS, END_TURN, EOS, TURN, make_tokenizer

CHAT_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}:{{ m.content }}<end_turn>\n"
  "{% endfor %}{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def llama():
  """Adds BOS by itself, as Llama's."""
  return make_tokenizer()


@pytest.fixture(scope="module")
def qwen():
  """Adds nothing, as Qwen's."""
  return make_tokenizer(adds=())


@pytest.fixture(scope="module")
def chat():
  """Adds BOS by itself, and so does its chat template, as Gemma's; a turn has an end of its own."""
  return make_tokenizer(chat_template=CHAT_TEMPLATE)


def text_of(tokenizer, ids):
  return tokenizer.decode(ids, skip_special_tokens=False)


def test_templates_are_those_of_the_reference():
  question = r"What is $\frac{1}{2}$ of {question}? {}"
  render = lambda name: parse_template(name, "").render(None, question)
  assert render("plain") == question
  assert render("math_task") == f"[MATH_TASK] Problem:\n{question}\n\nSolution:"
  head = (
    "<｜begin▁of▁sentence｜><｜User｜>Solve the following math problem efficiently and clearly."
  )
  math = render("r1_math")
  assert math.startswith(f"{head}  The last line of your response should be of the following ")
  assert r"final answer is: $\boxed{ANSWER}$. I hope it is correct' (without quotes)" in math
  assert math.endswith(f"before answering.\n\n{question}<｜Assistant｜><think>\n")
  gsm8k = render("r1_gsm8k")
  assert gsm8k.startswith(f"{head} The last line of your response should be of the following ")
  assert "final answer is: #### ANSWER. I hope it is correct' (without quotes)" in gsm8k
  assert gsm8k.endswith(f"before answering.\n\n{question}<｜Assistant｜>")
  assert render("r1_game24") == (
    "<｜begin▁of▁sentence｜>You are an intelligent system that calculates 24 point games, put your "
    r"final calculation expression into \boxed{}, for example \boxed{1 * 2 * 3 * 4}."
    f"<｜User｜>{question}<｜Assistant｜><think>\n"
  )


def test_a_template_of_ones_own():
  assert parse_template("Q: {question}\nA:", "").render(None, "why {x}?") == "Q: why {x}?\nA:"


def test_unknown_templates_are_named():
  with pytest.raises(UserError, match="template is 'math_tsk', it must be one of: plain, math_t"):
    parse_template("math_tsk", "")
  with pytest.raises(UserError, match="system is used by the template 'chat' alone, not by 'plain"):
    parse_template("plain", "Be brief.")


@pytest.mark.parametrize("text", ["{question}", "<s>{question}"])
def test_bos_stands_once(llama, text):
  (ids,) = token_ids(llama, Template(text), ["ab"])
  assert text_of(llama, ids) == "<s>ab" and ids.count(BOS) == 1


def test_no_bos_where_the_tokenizer_adds_none(qwen):
  assert token_ids(qwen, Template(), ["ab"]) == [qwen("ab")["input_ids"]]
  (ids,) = token_ids(qwen, Template("<s>{question}"), ["ab"])
  assert text_of(qwen, ids) == "<s>ab"


def test_nothing_is_added_behind_a_prompt():
  tokenizer = make_tokenizer(adds_behind=("</s>",))
  assert tokenizer("ab")["input_ids"][-1] == EOS
  (ids,) = token_ids(tokenizer, Template(), ["ab"])
  assert text_of(tokenizer, ids) == "<s>ab"


def test_chat(chat):
  first, second = token_ids(chat, Template("chat", "Be brief."), ["why?", "how {x}?"])
  expected = "<s><turn>system:Be brief.<end_turn>\n<turn>user:why?<end_turn>\n<turn>assistant:"
  assert text_of(chat, first) == expected and first.count(BOS) == 1
  assert text_of(chat, second) == expected.replace("why?", "how {x}?")
  (no_system,) = token_ids(chat, Template("chat"), ["why?"])
  assert text_of(chat, no_system) == "<s><turn>user:why?<end_turn>\n<turn>assistant:"


def test_a_chat_template_without_bos_gets_none():
  tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE.removeprefix("{{ bos_token }}"))
  (ids,) = token_ids(tokenizer, Template("chat"), ["why?"])
  assert ids[0] == TURN and BOS not in ids


def test_chats_that_cannot_be_are_told(llama):
  with pytest.raises(UserError, match="template is 'chat', but the tokenizer has no chat template"):
    token_ids(llama, Template("chat"), ["why?"])
  strict = make_tokenizer(
    chat_template="{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem role') }}"
    "{% endif %}"
  )
  with pytest.raises(UserError, match="refuses the turns system, user: no system role"):
    token_ids(strict, Template("chat", "Be brief."), ["why?"])


def test_what_ends_a_response(chat, llama):
  assert prompts.end_id(llama, Template()) == EOS
  assert prompts.end_id(chat, Template()) == EOS
  assert prompts.end_id(chat, Template("chat")) == END_TURN
  bare = make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}\n{% endfor %}")
  assert prompts.end_id(bare, Template("chat")) == EOS


def test_solutions_end_with_what_ends_a_response(chat):
  for template, end in ((Template(), EOS), (Template("chat", "Be brief."), END_TURN)):
    (ids,) = source.encode_solutions(chat, ["so 4"], template)
    assert text_of(chat, ids[:-1]) == "so 4" and ids[-1] == end and ids.dtype == np.int32
  with pytest.raises(UserError, match="no worked solution to start from: set config.warm_start"):
    source.encode_solutions(chat, ["so 4", ""])


@pytest.mark.parametrize(
  "listed, stops",
  [(None, (END_TURN, EOS)), (EOS, (END_TURN, EOS)), ([EOS, 9, END_TURN], (END_TURN, EOS, 9))],
)
def test_stop_tokens(chat, tmp_path, listed, stops):
  (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
  assert prompts.stop_ids(chat, Template("chat"), str(tmp_path)) == stops


def test_stop_tokens_without_a_usable_file(chat, tmp_path):
  assert prompts.stop_ids(chat, Template(), str(tmp_path)) == (EOS,)
  assert prompts.stop_ids(chat, Template(), "") == (EOS,)
  for content, message in [
    ("[]", "no generation config"),
    ('{"eos_token_id": "a"}', "eos_token_i"),
  ]:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
      prompts.stop_ids(chat, Template(), str(tmp_path))


def test_the_embedded_task_keeps_its_prompts(tmp_path):
  embedded = load_tokenizer("", work_dir=str(tmp_path))
  question = "ann has 19 pens . doubles how many ?"
  assert token_ids(embedded, Template(), [question]) == [embedded(question)["input_ids"]]
  assert prompts.stop_ids(embedded, Template(), "") == (embedded.eos_token_id,)


def test_long_prompts_are_left_out(llama):
  records = [{"question": "x" * n, "n": n} for n in (5, 2, 9, 3)]
  kept = source.keep_short_prompts(records, llama, Template(), 4)  # BOS counts
  assert [record["n"] for record in kept] == [2, 3]
  assert kept[-1]["n"] == 3 and kept[:1] == [records[1]]
  with pytest.raises(IndexError):
    kept[2]
  assert source.keep_short_prompts(records, llama, Template(), 10) is records
  with pytest.raises(UserError, match="all 4 prompts are longer than the 2 .*shortest has 3"):
    source.keep_short_prompts(records, llama, Template(), 2)
