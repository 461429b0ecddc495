"""DPO-Positive (arXiv 2402.13228), an offline baseline: right responses are preferred to wrong.

An iteration samples a group of responses a question and pairs its right ones with its wrong ones;
the loss asks that the ratio of their probabilities grows beyond the first policy's, and that right
responses do not become less likely. Variants are those of `grpo.py`.

  python -m spo_jax.main --config=configs/dpo_positive.py --workdir=runs/dpo_positive

`spo_jax/config.py` lists every field with its default; any of them is set as --config.field=value.
"""

from configs import restem


def get_config(variant: str | None = None):
  """The config of a variant: see `grpo.py`."""
  config = restem.get_config(variant)
  config.advantage.kind = "difference"
  config.loss.kind = "dpo_positive"
  config.loss.dpo_beta = 0.1
  config.loss.dpo_penalty = 50.0
  row = (
    config.rollout.max_prompt_tokens + config.rollout.samples * config.rollout.max_response_tokens
  )
  block = config.packing.query_block
  config.packing.row_length = max(config.packing.row_length, -(-row // block) * block)
  return config
