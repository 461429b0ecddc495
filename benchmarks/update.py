"""The packed update against one on (prefix, segment) rows: `python -m benchmarks.update`.

With `--plain ROWS TOKENS` it is an update on plain rows, beside other people's: `plain_update.py`.

Both take the same optimiser step from one full tree: the packed forest runs every token once, the
rows run a prefix again for every segment below it. There are rows of two kinds. `rows` are no straw
man: they have what of the packed step's means they can, products with our gradients, and logits of
the segment's own tokens alone, computed once. `ordinary rows` have neither: JAX's own gradients,
and a softmax of the logits of whole rows, as in the authors' trainer. In both, rows of one length
form a batch without padding, and attention is dense and causal over so few tokens. Micro-batches
hold as many tokens in all forms: on a CPU large ones are slow for any. All steps run in turn, in
one process: a packed one for each backend of attention, and those on rows.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks import plain_update
from benchmarks.timing import machine, print_columns
from spo_jax.algorithms import losses
from spo_jax.algorithms.logprobs import token_loss
from spo_jax.config import Config, OptimizerConfig
from spo_jax.forest import Forest, ForestBuilder
from spo_jax.learner import loss_config
from spo_jax.models import decoder
from spo_jax.models.attention import BACKENDS
from spo_jax.models.decoder import DecoderConfig, LayerKind, forward, init_params, unembedding
from spo_jax.models.rope import Rope
from spo_jax.training.objective import LossConfig
from spo_jax.training.optimizer import make_optimizer
from spo_jax.training.packing import PackConfig, pack
from spo_jax.training.step import TrainState, compiled_step, init_state, train_step

# Adam with a huge epsilon, for comparing gradients: its first update is the gradient times 1000,
# which rounding of the parameters does not hide.
OPTIMIZER = OptimizerConfig(learning_rate=1e11, clip_norm=1e9, eps=1e8)
ROWS = {"rows": False, "ordinary rows": True}  # by form, whether it is ordinary


def full_tree(branches: list[int], segment: int, prompt: int, vocab: int) -> Forest:
  """One tree with random tokens in which every segment has the same length."""
  rng = np.random.default_rng(0)
  builder = ForestBuilder()
  nodes = builder.add_roots(rng.integers(0, vocab, (1, prompt)), np.array([prompt]))
  for branch in branches:
    parents = np.repeat(nodes, branch)
    total = len(parents) * segment
    nodes = builder.add(
      parents,
      rng.integers(0, vocab, total),
      -np.log(vocab) + 0.1 * rng.standard_normal(total),
      np.full(len(parents), segment),
      np.zeros(len(parents), bool),
      probe=False,
    )
  return builder.build()


def segment_rows(forest: Forest, advantages: np.ndarray, most_tokens: int):
  """One row a segment, in batches of one length: (tokens, old log-probs, advantages) [M, B, ...].

  A batch has at most `most_tokens` tokens, and at least one row.

  Log-probs [M, B, S] and advantages [M, B] are of the segment, the last S tokens of a row.
  """
  buckets = []
  for depth in range(1, forest.depth.max() + 1):
    nodes = np.flatnonzero(forest.depth == depth)
    prompt = forest.node_tokens(0)
    tokens = np.stack([np.concatenate([prompt, forest.response(node)]) for node in nodes])
    per_batch = max(1, min(most_tokens // tokens.shape[1], len(nodes)))
    while len(nodes) % per_batch:
      per_batch -= 1
    old = np.stack([forest.logprobs[slice(*forest.offsets[n : n + 2])] for n in nodes])
    batched = lambda x: jnp.asarray(x.reshape(-1, per_batch, *x.shape[1:]))  # noqa: B023
    buckets.append((batched(tokens), batched(old), batched(advantages[nodes])))
  return buckets


def attend_causal(q, k, v, positions, context, cache, spec):
  """Dense causal attention over whole rows, without window or cap."""
  del positions, context
  B, T, H, Dh = q.shape
  K = k.shape[2]
  q = q.reshape(B, T, K, H // K, Dh)
  scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
  mask = jnp.tril(jnp.ones((T, T), bool))
  weights = jax.nn.softmax(jnp.where(mask, scores * spec.scale, -1e30), axis=-1).astype(v.dtype)
  return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(B, T, H, Dh), cache


def ordinary_product(x: jax.Array, weight: jax.Array) -> jax.Array:
  """`product` of the decoder with JAX's own gradient."""
  return jnp.tensordot(x, weight, x.ndim - 2)


def clipped_loss(loss_cfg: LossConfig, logprobs, mask, columns, _=None):
  """(PPO's clipped loss, its sums); columns are old log-probs and advantages."""
  sums = losses.ppo_clip(
    logprobs,
    *columns,
    mask,
    epsilon_low=loss_cfg.epsilon_low,
    epsilon_high=loss_cfg.epsilon_high,
    log_ratio_bound=loss_cfg.log_ratio_bound,
  )
  return sums.loss, sums


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="state")
def rows_step(cfg: DecoderConfig, loss_cfg: LossConfig, ordinary: bool, state: TrainState, buckets):
  """The update of `train_step` without a KL term, on rows; returns (state, loss)."""
  count = sum(old.size for _, old, _ in buckets)

  def loss_fn(params, batch):
    tokens_BxT, old_BxS, advantages_B = batch
    T, S = tokens_BxT.shape[1], old_BxS.shape[1]
    positions = jnp.broadcast_to(jnp.arange(T), tokens_BxT.shape)
    multiply = ordinary_product if ordinary else decoder.product
    with mock.patch.object(decoder, "product", multiply):
      hidden, _ = forward(cfg, attend_causal, params, tokens_BxT, positions)
    columns = (old_BxS, jnp.broadcast_to(advantages_B[:, None], old_BxS.shape))
    mask_BxS = jnp.ones(old_BxS.shape, bool)
    if ordinary:
      logits = jnp.dot(hidden[:, :-1], unembedding(cfg, params), preferred_element_type=jnp.float32)
      logprobs = jax.nn.log_softmax(logits / loss_cfg.temperature)
      taken = jnp.take_along_axis(logprobs, tokens_BxT[:, 1:, None], axis=-1)[..., 0]
      return clipped_loss(loss_cfg, taken[:, -S:], mask_BxS, columns)[0] / count
    total, _ = token_loss(
      functools.partial(clipped_loss, loss_cfg),
      hidden[:, T - S - 1 : T - 1],
      unembedding(cfg, params),
      tokens_BxT[:, T - S :],
      mask_BxS,
      columns,
      chunk=loss_cfg.logprob_chunk,
      temperature=loss_cfg.temperature,
    )
    return total / count

  def add(total, batch):
    return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(state.params, batch)), None

  total = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
  for bucket in buckets:
    total, _ = jax.lax.scan(add, total, bucket)
  loss, grads = total
  updates, opt_state = make_optimizer(OPTIMIZER).update(grads, state.opt_state, state.params)
  return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), loss


def check_agreement(params, first, second) -> float:
  """Largest difference of the first update, as a share of its largest entry; raises above 1e-5."""
  (first_state, first_loss), (second_state, second_loss) = first, second
  np.testing.assert_allclose(first_loss, second_loss, rtol=1e-4, atol=1e-7)
  error = 0.0
  for old, a, b in zip(
    *map(jax.tree.leaves, (params, first_state.params, second_state.params)), strict=True
  ):
    a, b = np.asarray(a - old), np.asarray(b - old)
    error = max(error, float(np.abs(a - b).max() / np.abs(b).max()))
  if error > 1e-5:
    raise AssertionError(f"gradients differ by {error:.1e} of their largest entry")
  return error


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.update",
    description=__doc__.split("\n")[0],
    epilog="Plain rows have flags of their own: --plain 16 256 --help",
  )
  add = functools.partial(parser.add_argument, type=int)
  add("--branches", nargs="+", default=[6, 6, 6], help="children of a node, by depth")
  add("--segment", default=48, help="tokens of a segment; the prompt has a sixth of it")
  add("--layers", default=4)
  add("--width", default=256)
  add("--vocab", default=1024)
  add("--query-block", default=64, help="queries of an attention block of the packed forest")
  add("--key-block", default=16, help="keys of one")
  add("--micro-batch", default=2080, help="most tokens of a micro-batch, of either form")
  add("--repeats", default=5)
  add("--dtype", type=str, default="float32", help="of activations")
  add(
    "--attention",
    type=str,
    nargs="+",
    choices=BACKENDS,
    default=["blocks", "flash"],
    help="backends of the packed forest",
  )
  return parser.parse_args(argv)


def configs(args: argparse.Namespace) -> tuple[DecoderConfig, LossConfig]:
  """The model and the loss that both forms train."""
  model = DecoderConfig(
    vocab_size=args.vocab,
    width=args.width,
    layers=args.layers,
    heads=args.width // 32,
    kv_heads=max(1, args.width // 64),
    head_dim=32,
    ffn=8 * args.width // 3 // 8 * 8,
    layer_kinds=(LayerKind(Rope(1e4)),),
    norm_eps=1e-6,
    tie_embeddings=True,
    dtype=args.dtype,
    remat="none",
  )
  loss = dataclasses.replace(
    loss_config(Config()),
    use_probability_mask=False,
    scaling="none",
    ratio_threshold=1e9,
    kl_coef=0.0,
    logprob_chunk=512,
  )
  return model, loss


def packed_tree(args: argparse.Namespace, forest: Forest, advantages: np.ndarray):
  """The tree as one micro-batch row, or several where it is longer than a micro-batch may be.

  Returns:
    (the packed batch, its number of micro-batches, tokens of all rows).
  """
  blocks = -(-min(args.micro_batch, len(forest.tokens)) // args.query_block)
  row_length = blocks * args.query_block
  shape = PackConfig(row_length, 1, args.query_block, args.key_block)
  packed, counts = pack(forest, advantages, forest.depth > 0, shape)
  micro_batches = counts["micro_batches"]
  return jax.tree.map(jnp.asarray, packed), micro_batches, micro_batches * row_length


def measure(steps, fresh, repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
  """Seconds and CPU seconds (of all cores) of each step, which take turns."""
  seconds, cpu_seconds = ({name: [] for name in steps} for _ in range(2))
  for _ in range(repeats):
    for name, step in steps.items():
      state = jax.block_until_ready(fresh())
      began, cpu_began = time.perf_counter(), time.process_time()
      jax.block_until_ready(step(state))
      seconds[name].append(time.perf_counter() - began)
      cpu_seconds[name].append(time.process_time() - cpu_began)
  return seconds, cpu_seconds


def summary(tokens, seconds, cpu_seconds) -> dict[str, Any]:
  """Medians, extremes and the ratios of either form of rows to each packed form."""
  median = {name: statistics.median(times) for name, times in seconds.items()}
  # On a CPU that other processes share, steadier than the clock.
  cpu = {name: statistics.median(times) for name, times in cpu_seconds.items()}
  packed = [name for name in tokens if name not in ROWS]
  ratios = lambda of: {f"{rows} / {name}": of[rows] / of[name] for rows in ROWS for name in packed}
  return {
    "tokens": tokens,
    "seconds": {name: [min(t), median[name], max(t)] for name, t in seconds.items()},
    "cpu_seconds": cpu,
    "ratio": ratios(median),
    "cpu_ratio": ratios(cpu),
    "token_ratio": ratios(tokens),
  }


def print_table(record: dict[str, Any]) -> None:
  """The record, to be read."""
  print(
    f"{record['machine']}; {record['layers']} layers of {record['width']}, vocabulary "
    f"{record['vocab']}, {record['dtype']}"
  )
  print(
    f"tree {record['branches']}, segments of {record['segment']}; gradients agree to "
    f"{record['gradient_error']:.0e}"
  )
  cells = {}
  for name, times in record["seconds"].items():
    memory = (record["temporary_mib"][name], record["peak_mib"][name])
    cells[name] = (
      str(record["tokens"][name]),
      *(f"{mib:.1f}" for mib in memory),
      *(f"{seconds:.3f}" for seconds in (*times, record["cpu_seconds"][name])),
    )
  columns = ("tokens", "temporary MiB", "peak MiB", "min s", "median s", "max s", "CPU s")
  print_columns(columns, cells)
  for forms, ratio in record["ratio"].items():
    print(
      f"{forms}: {ratio:.2f} in time, {record['cpu_ratio'][forms]:.2f} in CPU time, "
      f"{record['token_ratio'][forms]:.2f} in tokens"
    )


def memory(step: jax.stages.Compiled) -> tuple[float, float]:
  """MiB of a compiled step: its temporaries, and all that it holds with state and batch."""
  stats = step.memory_analysis()
  kept = stats.output_size_in_bytes - stats.alias_size_in_bytes  # the donated state is overwritten
  temporary = stats.temp_size_in_bytes
  return temporary / 2**20, (stats.argument_size_in_bytes + kept + temporary) / 2**20


def main(argv: Sequence[str]) -> int:
  """Runs what the command line asks for."""
  if "--plain" in argv:
    return plain_update.main(argv)
  compare(parse_args(argv))
  return 0


def compare(args: argparse.Namespace) -> None:
  """Checks, measures and prints the forms of a tree."""
  cfg, loss_cfg = configs(args)
  forest = full_tree(args.branches, args.segment, max(1, args.segment // 6), args.vocab)
  advantages = np.random.default_rng(1).standard_normal(len(forest.parent)).astype(np.float32)
  packed, micro_batches, packed_tokens = packed_tree(args, forest, advantages)
  rows = segment_rows(forest, advantages, args.micro_batch)
  batch = packed, jnp.int32(0), jnp.int32(micro_batches)
  params = nn.unbox(jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0)))
  fresh = lambda: init_state(jax.tree.map(jnp.copy, params), OPTIMIZER)

  def packed_step(backend):
    backend_cfg = dataclasses.replace(cfg, attention=backend)
    step = compiled_step(train_step, fresh())
    return step.lower(backend_cfg, loss_cfg, OPTIMIZER, fresh(), *batch).compile()

  compiled = {backend: packed_step(backend) for backend in args.attention}
  for name, ordinary in ROWS.items():
    compiled[name] = rows_step.lower(cfg, loss_cfg, ordinary, fresh(), rows).compile()

  def packed_update(state, backend):
    state, metrics = compiled[backend](state, *batch)
    return state, metrics["loss"]

  steps = {name: functools.partial(packed_update, backend=name) for name in args.attention}
  steps |= {name: lambda state, name=name: compiled[name](state, rows) for name in ROWS}
  on_rows = steps["rows"](fresh())
  others = (steps[name](fresh()) for name in steps if name != "rows")
  error = max(check_agreement(params, other, on_rows) for other in others)
  seconds, cpu_seconds = measure(steps, fresh, args.repeats)
  tokens = dict.fromkeys(args.attention, packed_tokens)
  tokens |= dict.fromkeys(ROWS, sum(tokens.size for tokens, _, _ in rows))
  mib = {name: memory(step) for name, step in compiled.items()}
  record = {
    "benchmark": "update",
    "machine": machine(),
    "jax": jax.__version__,
    **vars(args),
    "key_blocks": packed.key_blocks.shape[-1],
    "gradient_error": error,
    "temporary_mib": {name: temporary for name, (temporary, _) in mib.items()},
    "peak_mib": {name: peak for name, (_, peak) in mib.items()},
    **summary(tokens, seconds, cpu_seconds),
  }
  print_table(record)
  print(json.dumps(record))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
