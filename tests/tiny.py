"""A tiny model, its prompts and its sampler, shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spo_jax.infra.mesh import make_mesh, param_shardings
from spo_jax.models.decoder import DecoderConfig, LayerKind, init_params
from spo_jax.models.rope import Rope
from spo_jax.sampling.sampler import Sampler
from spo_jax.sampling.strategies import Prompts
from spo_jax.sampling.token import SamplingConfig
from spo_jax.training.objective import LossConfig
from spo_jax.training.optimizer import OptimizerConfig

EOS = 1
PAD = 0
VOCAB = 32


def tiny_config(**overrides) -> DecoderConfig:
  """Geometry of a decoder of 2 layers and 16 channels, with grouped queries."""
  fields = {
    "vocab_size": VOCAB,
    "width": 16,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "ffn": 24,
    "layer_kinds": (LayerKind(Rope(1e4, "exact")),),
    "norm_eps": 1e-6,
    "tie_embeddings": False,
    "dtype": "float32",
    "remat": "none",
  }
  return DecoderConfig(**(fields | overrides))


def loss_config(**overrides) -> LossConfig:
  """SPO's loss, with weights that make each of its terms matter."""
  fields = {
    "kind": "ppo_clip",
    "temperature": 1.0,
    "use_probability_mask": True,
    "probability_threshold": 0.03,
    "scaling": "whiten",
    "normalization": "token",
    "response_tokens": 7,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "log_ratio_bound": 20.0,
    "ratio_threshold": 10.0,
    "importance_cap": 0.0,
    "kl_coef": 0.5,
    "kl_in": "loss",
    "kl_estimator": "control_variate",
    "kl_clip_max": 10.0,
    "forward_kl_coef": 0.0,
    "forward_kl_clip_max": 10.0,
    "dpo_beta": 0.1,
    "dpo_penalty": 5.0,
    "logprob_chunk": 12,
    "critic": None,
  }
  return LossConfig(**(fields | overrides))


def optimizer_config(**overrides) -> OptimizerConfig:
  """A constant rate, clipping at norm 1."""
  fields = {
    "learning_rate": 3e-3,
    "warmup_steps": 0,
    "decay_steps": 0,
    "decay": "cosine",
    "clip_norm": 1.0,
    "weight_decay": 0.0,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
  }
  return OptimizerConfig(**(fields | overrides))


# Adam with a huge epsilon: the first update is the gradient itself.
SGD = optimizer_config(learning_rate=1e8, clip_norm=1e9, eps=1e8, b1=0.0)


def tiny_params(cfg: DecoderConfig, seed: int = 0):
  """Unboxed parameters whose distributions are spread; one token in 5 to 20 is `EOS`.

  Drawn by NumPy, as compiling `init_params` takes longer than most tests.
  """
  rng = np.random.default_rng(seed)
  shapes = nn.unbox(jax.eval_shape(lambda: init_params(cfg, jax.random.key(0))))
  draw = lambda x: np.ones(x.shape) if len(x.shape) == 1 else rng.normal(size=x.shape) / 4
  params = jax.tree.map(lambda x: draw(x).astype(np.float32), shapes)
  if cfg.tie_embeddings:
    params["embedding"] *= 1.5
    params["embedding"][EOS] *= 3.0
  else:
    params["unembedding"] *= 1.5
    params["unembedding"][:, EOS] *= 4.0
  return jax.tree.map(jnp.asarray, params)


def shard_params(cfg: DecoderConfig, mesh: jax.sharding.Mesh, params):
  """Parameters on a mesh, placed by their logical axes."""
  shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
  return jax.device_put(params, param_shardings(mesh, shapes))


def tiny_prompts(count: int, *, longest: int = 6, seed: int = 0) -> Prompts:
  """Prompts of 2 to `longest` tokens, padded, with keys of their own; none contains `EOS`."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, longest + 1, count).astype(np.int32)
  tokens = rng.integers(2, VOCAB, (count, longest)).astype(np.int32)
  tokens[np.arange(longest) >= lengths[:, None]] = PAD
  return Prompts(tokens, lengths, jax.random.split(jax.random.key(seed + 100), count))


def take_prompts(prompts: Prompts, index) -> Prompts:
  """Some of the prompts."""
  index = np.asarray(index)
  return Prompts(prompts.tokens[index], prompts.lengths[index], prompts.keys[jnp.asarray(index)])


def tiny_sampler(
  cfg: DecoderConfig,
  *,
  mesh=None,
  slots=64,
  refill_share=0.25,
  suffix_chunks=2,
  prefill_chunk=0,
  **sampling,
):
  """The compiled verbs for one device, or for a mesh."""
  return Sampler(
    cfg=cfg,
    mesh=mesh or make_mesh(1, 1, 1),
    stop_ids=(EOS,),
    sampling=SamplingConfig(**sampling),
    slots=slots,
    refill_share=refill_share,
    suffix_chunks=suffix_chunks,
    prefill_chunk=prefill_chunk,
  )
