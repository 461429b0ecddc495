"""A run of a tiny model on a mesh of 8 devices, and sizes made up."""

import dataclasses

from spo_jax.config import Config, EvalConfig, MeshConfig, PackingConfig, RolloutConfig
from spo_jax.infra.mesh import make_mesh
from spo_jax.planning.measure import Measured
from spo_jax.planning.programs import Setup
from tests.tiny import tiny_config

MODEL = tiny_config(layers=1)
CONFIG = Config(
  rollout=RolloutConfig(
    prompts=8,
    max_prompt_tokens=6,
    max_response_tokens=10,
    branches=(2, 2),
    segment_tokens=(4,),
    samples=2,
    probes=2,
    slots=8,
  ),
  packing=PackingConfig(32, rows=8, query_block=16, key_block=8, logprob_chunk=32),
  eval=EvalConfig(prompts=8, batch=8),
  mesh=MeshConfig(data=1, fsdp=8),
)


def changed(config: Config = CONFIG, **fields) -> Config:
  """A config with fields of some of its sections changed: `rollout={"slots": 4}`."""
  sections = {
    name: dataclasses.replace(getattr(config, name), **values) for name, values in fields.items()
  }
  return dataclasses.replace(config, **sections)


def setup_of(data: int = 1, fsdp: int = 8, **fields) -> Setup:
  """What is planned for a mesh, with fields of the config's sections changed."""
  mesh = make_mesh(data, fsdp, 1)
  return Setup(changed(**fields), MODEL.on(mesh), mesh)


def sized(
  total: float, phase: str = "update", name: str = "train_step", compiled: bool = True
) -> Measured:
  """A program with so many bytes of temporaries and no others."""
  return Measured(name, phase, 1.0, 0, 0, 0, total, 0, compiled)
