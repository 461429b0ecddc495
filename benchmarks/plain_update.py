"""One policy-gradient step on plain rows, ours beside others on the same weights.

  python -m benchmarks.update --plain 16 256

There is no tree, so nothing is shared: every row is a group of one response, and every token but
the first is trained. `ours` is `train_step` on the packed rows, `hf` a model of transformers with
PyTorch's AdamW, `tunix` google-tunix's trainer, where they are installed. All steps run in turn and
in one process, each on with its own parameters. The first call of each compiles, and is told apart.
The losses must agree, those after an update too. Prints a table and a line of JSON.
"""

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.peer_trainers import EPSILON, TRAINERS, Rows
from benchmarks.timing import (
  add_model_arguments,
  command_parser,
  in_turn,
  machine,
  machine_rates,
  print_columns,
  run,
)
from spo_jax.config import Config, OptimizerConfig
from spo_jax.forest import ForestBuilder
from spo_jax.learner import loss_config
from spo_jax.models.attention import BACKENDS
from spo_jax.models.decoder import count_params
from spo_jax.training.objective import LossConfig
from spo_jax.training.packing import PackConfig, PackedForest, pack
from spo_jax.training.step import init_state, train_step

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.01)
# Of the first losses, and of those after an update: Adam divides the smallest gradients by their
# own size, rounding included.
TOLERANCES = (1e-4, 1e-3)
PAUSE_S = 0.5  # OpenMP's threads spin for a fraction of a second after PyTorch's last operation


def plain_rows(rows: int, length: int, vocab: int) -> Rows:
  """Random tokens; log-probs near those of a random model; advantages whose mean is not zero."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
  noise = 0.1 * rng.standard_normal((rows, length - 1))
  advantages = 0.5 + rng.standard_normal(rows)
  return Rows(tokens, (noise - np.log(vocab)).astype(np.float32), advantages.astype(np.float32))


def packed_rows(rows: Rows, shape: PackConfig) -> tuple[PackedForest, int]:
  """Each row as a tree of a prompt, its first token, and one response.

  Returns:
    (the packed batch, micro-batches in use).
  """
  B, T = rows.tokens.shape
  builder = ForestBuilder()
  roots = builder.add_roots(rows.tokens[:, :1], np.ones(B, np.int32))
  builder.add(
    roots,
    rows.tokens[:, 1:].reshape(-1),
    rows.old_logprobs.reshape(-1),
    np.full(B, T - 1),
    np.ones(B, bool),
    probe=False,
  )
  forest = builder.build()
  advantages = np.where(forest.depth > 0, rows.advantages[forest.tree], 0)
  batch, counts = pack(forest, advantages.astype(np.float32), forest.depth > 0, shape)
  return jax.tree.map(jnp.asarray, batch), counts["micro_batches"]


def plain_loss(chunk: int) -> LossConfig:
  """The clipped surrogate over all tokens, and nothing else."""
  return dataclasses.replace(
    loss_config(Config()),
    use_probability_mask=False,
    scaling="none",
    epsilon_low=EPSILON,
    epsilon_high=EPSILON,
    kl_coef=0.0,
    logprob_chunk=chunk,
  )


class Ours:
  """`train_step`, as a trainer of `peer_trainers.py`."""

  def __init__(self, model: peers.Model, rows: Rows, shape: PackConfig, chunk: int, backend: str):
    batch, micro_batches = packed_rows(rows, shape)
    self._batch = batch, jnp.int32(0), jnp.int32(micro_batches)
    cfg = dataclasses.replace(model.cfg, attention=backend)
    self._step = functools.partial(train_step, cfg, plain_loss(chunk), OPTIMIZER)
    # On a device by name, as a step leaves it, or the second step would be compiled once more; and
    # a copy, since steps donate their parameters.
    params = jax.device_put(model.params, jax.devices()[0])
    self._state = init_state(jax.tree.map(jnp.copy, params), OPTIMIZER)

  @property
  def params(self) -> Any:
    """Parameters after the steps so far."""
    return self._state.params

  def __call__(self, turn: int) -> float:
    del turn
    self._state, metrics = jax.block_until_ready(self._step(self._state, *self._batch))
    return float(metrics["loss"])


def check_agreement(losses: dict[str, list[float]]) -> float:
  """Largest relative difference of a first loss from ours.

  Raises:
    AssertionError: if a loss of one of the first steps is off by more than its tolerance.
  """
  for name, theirs in losses.items():
    for step, (loss, ours, rtol) in enumerate(
      zip(theirs, losses["ours"], TOLERANCES, strict=False), start=1
    ):
      np.testing.assert_allclose(loss, ours, rtol, err_msg=f"loss of {name} in step {step}")
  return max(abs(theirs[0] / losses["ours"][0] - 1) for theirs in losses.values())


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = command_parser("update", __doc__)
  add_model_arguments(parser)
  add = functools.partial(parser.add_argument, type=int)
  add("--plain", nargs=2, metavar=("ROWS", "TOKENS"), required=True)
  add("--micro-rows", default=1, help="ours: rows of a micro-batch; on a CPU few are best")
  add("--block", default=0, help="ours: queries and keys of an attention block; 0: a row")
  add("--chunk", default=256, help="ours: tokens a row that are unembedded at a time")
  add("--attention", type=str, choices=BACKENDS, default="blocks", help="ours: its backend")
  add("--repeats", default=5)
  add("--peers", type=str, nargs="*", choices=TRAINERS, default=list(TRAINERS))
  args = parser.parse_args(argv)
  rows, length = args.plain
  args.block = args.block or length
  if length < 2 or length % args.block:
    parser.error(f"--plain: {length} tokens must be 2 or more and a multiple of --block")
  if args.micro_rows < 1 or rows % args.micro_rows:
    parser.error(f"--plain: {rows} rows are no multiple of --micro-rows {args.micro_rows}")
  return args


def print_table(record: dict[str, Any]) -> None:
  """The record, to be read."""
  rows, length = record["plain"]
  print(
    f"{record['machine']}, {record['matmul_gflops']:.0f} GFLOP/s, {record['copy_gb_s']:.0f} GB/s; "
    f"{record['layers']} layers of {record['width']}, vocabulary {record['vocab']}; "
    f"one update on {rows} rows of {length} tokens; losses agree to {record['loss_error']:.0e}"
  )
  engines = record["engines"]
  ours = statistics.median(engines["ours"]["seconds"])
  cells = {}
  for name, one in engines.items():
    median = statistics.median(one["seconds"])
    times = (min(one["seconds"]), median, max(one["seconds"]), one["first_s"], median / ours)
    cells[name] = (f"{rows * length / median:.0f}", *(f"{x:.2f}" for x in times))
  print_columns(("tokens/s", "min s", "median s", "max s", "first s", "to ours"), cells)


def measure(args: argparse.Namespace) -> None:
  """Checks, measures and prints.

  Raises:
    UserError: if there can be no such model.
  """
  rows, length = args.plain
  model = peers.random_model(args.layers, args.width, args.vocab)
  data = plain_rows(rows, length, args.vocab)
  shape = PackConfig(length, args.micro_rows, args.block, args.block)
  engines = {"ours": Ours(model, data, shape, args.chunk, args.attention)}
  engines |= peers.load(TRAINERS, args.peers, model, data, OPTIMIZER)
  rates = machine_rates()
  timed = in_turn(engines, args.repeats, PAUSE_S)
  losses = {name: one.results for name, one in timed.items()}
  record = {
    "benchmark": "plain_update",
    "machine": machine(),
    "jax": jax.__version__,
    **vars(args),
    "parameters": count_params(model.params),
    **rates,
    "loss_error": check_agreement(losses),
    "engines": {
      name: {"first_s": one.first_s, "seconds": one.seconds, "losses": one.results}
      for name, one in timed.items()
    },
  }
  print_table(record)
  print(json.dumps(record))


def main(argv: Sequence[str] | None = None) -> int:
  """Measures and prints; returns the exit status."""
  return run("update", measure, parse_args(argv))
