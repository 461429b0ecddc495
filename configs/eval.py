"""Evaluation of a Hugging Face model, with the sampling of the paper: temperature 0.6, top-p 0.95.

  python -m spo_jax.evaluate --config=configs/eval.py:math500 --config.model=DIR --workdir=runs/eval

A variant names a data set. Sets that cannot be downloaded are read from --config.data.manual_dir;
`spo_jax/data/sets.py` lists the files. --config.contexts="(2048, 4096, 32768)" asks for other
budgets, --config.samples=16 for more responses a problem: avg@k, pass@k and maj@k. The template is
that of DeepSeek-R1-Distill-Qwen; base models want --config.data.template=math_task, chat models
--config.data.template=chat.

`EvaluationConfig` in `spo_jax/config.py` lists every field.
"""

from spo_jax.config import EMBEDDED, EvaluationConfig, default_config, parse_variant

# Data set, split, template, grader.
VARIANTS = {
  "math500": ("math500", "test", "r1_math", "math"),
  "aime24": ("aime24", "test", "r1_math", "math"),
  "math_validation": ("math", "validation", "r1_math", "math"),
  "gsm8k": ("gsm8k", "test", "math_task", "gsm8k"),
  "gsm8k_validation": ("gsm8k", "validation", "math_task", "gsm8k"),
  "game24": ("game24", "test", "r1_game24", "game24"),
  "json": ("json", "test", "plain", "math"),  # your own JSON lines
  "arithmetic": ("arithmetic", "test", "plain", "numbers"),  # an embedded task
  "countdown": ("countdown", "test", "plain", "countdown"),  # the other
}


def get_config(variant: str | None = None):
  """The config of a variant; `math500` is the default."""
  config = default_config(EvaluationConfig)
  name, split, template, grader = VARIANTS[parse_variant(variant, VARIANTS, "math500")]
  config.split = split
  config.data.name = name
  config.data.template = template
  config.data.grader = grader
  config.temperature = 0.6
  config.top_p = 0.95
  config.contexts = (2048, 4096)
  config.compute.dtype = "bfloat16"
  if name in EMBEDDED:
    config.contexts = (96,)
    config.max_prompt_tokens = 40
    config.compute.dtype = "float32"
  return config
