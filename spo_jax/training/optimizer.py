"""The optimiser: Adam with decoupled weight decay, a schedule, clipping by the global norm."""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Hashable, a static argument of jitted functions."""

  learning_rate: float
  warmup_steps: int  # updates until the learning rate is reached, linearly
  decay_steps: int  # updates after which the decay ends at 0; 0 keeps the rate constant
  decay: str  # "cosine" or "linear"
  clip_norm: float  # bound on the global norm of the gradients
  weight_decay: float
  b1: float
  b2: float
  eps: float


def make_schedule(cfg: OptimizerConfig) -> optax.Schedule:
  """Learning rate against the number of updates done."""
  first = cfg.learning_rate / (cfg.warmup_steps + 1)  # not 0: the first update counts too
  if cfg.decay_steps and cfg.decay == "cosine":
    return optax.warmup_cosine_decay_schedule(
      first, cfg.learning_rate, cfg.warmup_steps, cfg.decay_steps
    )
  if cfg.decay_steps:
    rise = optax.linear_schedule(first, cfg.learning_rate, cfg.warmup_steps)
    fall = optax.linear_schedule(cfg.learning_rate, 0.0, cfg.decay_steps - cfg.warmup_steps)
    return optax.join_schedules([rise, fall], [cfg.warmup_steps])
  if cfg.warmup_steps:
    return optax.linear_schedule(first, cfg.learning_rate, cfg.warmup_steps)
  return optax.constant_schedule(cfg.learning_rate)


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
  """The gradient transformation."""
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip_norm),
    optax.adamw(
      make_schedule(cfg), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay
    ),
  )
