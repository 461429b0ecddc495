"""Other people's policy-gradient step on plain rows, on a checkpoint in Hugging Face format.

A trainer takes a step at each call and returns the loss before it: the mean of PPO's clipped
surrogate over every token but the first of a row.
"""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from spo_jax.training.optimizer import OptimizerConfig, make_optimizer

EPSILON = 0.2  # of PPO's clip, from both sides


class Rows(NamedTuple):
  """What is trained."""

  tokens: np.ndarray  # [B, T] int32
  old_logprobs: np.ndarray  # [B, T - 1] float32, of all tokens but the first
  advantages: np.ndarray  # [B] float32


class HuggingFace:
  """A model of transformers and PyTorch's AdamW, without its compiler, as TRL trains."""

  needs = peers.HuggingFace.needs

  def __init__(self, folder: pathlib.Path, rows: Rows, cfg: OptimizerConfig):
    import torch
    import transformers

    self._torch, self._clip_norm = torch, cfg.clip_norm
    self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    self._model.train()
    self._optimizer = torch.optim.AdamW(
      self._model.parameters(),
      cfg.learning_rate,
      (cfg.b1, cfg.b2),
      cfg.eps,
      cfg.weight_decay,
      fused=True,
    )
    self._tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    self._old = torch.from_numpy(rows.old_logprobs)
    self._advantages = torch.from_numpy(rows.advantages)[:, None]

  def __call__(self, turn: int) -> float:
    del turn
    torch = self._torch
    # The last token predicts nothing that is trained, so it is not run.
    logits = self._model(self._tokens[:, :-1], use_cache=False).logits
    targets = self._tokens[:, 1:].flatten()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    ratios = torch.exp(-nll.view_as(self._old) - self._old)
    clipped = ratios.clamp(1 - EPSILON, 1 + EPSILON)
    loss = torch.maximum(-self._advantages * ratios, -self._advantages * clipped).mean()
    self._optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
    self._optimizer.step()
    return loss.item()


def one_device_mesh() -> jax.sharding.Mesh:
  """The first device, by the names that tunix gives to a mesh's axes."""
  return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


class Tunix:
  """The compiled step of google-tunix's own trainer with its own GRPO loss."""

  needs = peers.Tunix.needs

  def __init__(self, folder: pathlib.Path, rows: Rows, cfg: OptimizerConfig):
    from tunix.rl import function_registry
    from tunix.rl.grpo import grpo_learner
    from tunix.sft import peft_trainer

    self._mesh = one_device_mesh()
    model = peers.tunix_model(folder, self._mesh)
    grpo = grpo_learner.GRPOConfig(beta=0.0, epsilon=EPSILON, loss_agg_mode="token-mean")
    grpo.temperature = 1.0  # which its learner sets
    loss = function_registry.get_policy_loss_fn(grpo.policy_loss_fn)
    outside = model.config.vocab_size  # no token is padding or an end
    trainer = peft_trainer.PeftTrainer(
      model, make_optimizer(cfg), peft_trainer.TrainingConfig(eval_every_n_steps=1)
    )
    trainer.with_loss_fn(
      lambda model, train_example: loss(model, train_example, grpo, outside, outside), has_aux=True
    )
    trainer.with_gen_model_input_fn(lambda example: {"train_example": example})
    with self._mesh:  # else the second step compiles once more
      self._step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    prompts, completions = jnp.asarray(rows.tokens[:, :1]), jnp.asarray(rows.tokens[:, 1:])
    self._example = grpo_learner.TrainExample(
      prompt_ids=prompts,
      prompt_mask=jnp.ones(prompts.shape, bool),
      completion_ids=completions,
      completion_mask=jnp.ones(completions.shape, bool),
      advantages=jnp.asarray(rows.advantages),
      ref_per_token_logps=None,
      old_per_token_logps=jnp.asarray(rows.old_logprobs),
    )

  def __call__(self, turn: int) -> float:
    del turn
    with self._mesh:
      loss, _, _ = self._step(self._example)
    return float(loss)


TRAINERS = {"hf": HuggingFace, "tunix": Tunix}
