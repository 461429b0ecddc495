"""Small forests, and what the packed batch is compared with: plain (prefix, segment) rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.forest import Forest, ForestBuilder
from spo_jax.models.decoder import forward, token_logits
from spo_jax.training.step import policy_gradient
from tests.tiny import VOCAB

# Compiled once for all tests that take it with the same shapes.
packed_gradient = jax.jit(policy_gradient, static_argnums=(0, 1))


def _add(builder, rng, parents, lengths, *, finished=None, probe=False):
  total = int(np.sum(lengths))
  return builder.add(
    parents,
    rng.integers(2, VOCAB, total),
    -np.log(VOCAB) + 0.3 * rng.standard_normal(total),
    lengths,
    np.zeros(len(lengths), bool) if finished is None else finished,
    probe=probe,
  )


def _roots(builder, rng, lengths):
  lengths = np.asarray(lengths)
  tokens = rng.integers(2, VOCAB, (len(lengths), lengths.max()))
  return builder.add_roots(tokens, lengths)


def tree_forest(rng, branches, longest, *, prompts=(3,), ragged=False) -> Forest:
  """Trees, level by level as the sampler grows them.

  Args:
    rng: NumPy generator.
    branches: children of a node, by depth.
    longest: tokens of a segment, by depth.
    prompts: tokens of each prompt.
    ragged: segments that end early are leaves, about one in three.

  Returns:
    The forest.
  """
  builder = ForestBuilder()
  nodes = _roots(builder, rng, prompts)
  for branch, most in zip(branches, longest, strict=True):
    parents = np.repeat(nodes, branch)
    lengths = rng.integers(1, most + 1, len(parents)) if ragged else np.full(len(parents), most)
    finished = rng.random(len(parents)) < 1 / 3 if ragged else np.zeros(len(parents), bool)
    nodes = _add(builder, rng, parents, lengths, finished=finished)[~finished]
  return builder.build()


def path_forest(rng, prompts, responses) -> Forest:
  """Prompts with one response each."""
  builder = ForestBuilder()
  roots = _roots(builder, rng, prompts)
  _add(builder, rng, roots, np.asarray(responses), finished=np.ones(len(roots), bool))
  return builder.build()


def chain_forest(rng, *, prompts=(3, 4), samples=2, segments=3, longest=4, probes=2) -> Forest:
  """Trajectories as paths of segments, and probes from the prompt and from each cut."""
  builder = ForestBuilder()
  roots = _roots(builder, rng, prompts)
  cuts = list(roots)
  for root in roots:
    for _ in range(samples):
      above = root
      for segment in range(segments):
        last = segment == segments - 1
        (above,) = _add(
          builder, rng, [above], rng.integers(1, longest + 1, 1), finished=np.array([last])
        )
        if not last:
          cuts.append(above)
  parents = np.repeat(cuts, probes)
  lengths = rng.integers(1, longest + 1, len(parents))
  _add(builder, rng, parents, lengths, finished=np.ones(len(parents), bool), probe=True)
  return builder.build()


def own_segments(forest: Forest) -> np.ndarray:
  """[N] bool, segments that may be trained."""
  return (forest.depth > 0) & ~forest.probe


def node_path(forest: Forest, node: int) -> list[int]:
  """Nodes from the root to `node`."""
  path = [node]
  while forest.parent[path[-1]] >= 0:
    path.append(int(forest.parent[path[-1]]))
  return path[::-1]


def path_tokens(forest: Forest, node: int) -> list[int]:
  """Indices into `forest.tokens` from the root to the end of `node`."""
  spans = [range(*forest.offsets[n : n + 2]) for n in node_path(forest, node)]
  return [index for span in spans for index in span]


def segment_rows(forest, advantages, trained, shape) -> dict[str, np.ndarray]:
  """A right-padded row a trained segment: prompt, ancestors, segment; loss on the segment alone."""
  rows = {
    "tokens": np.zeros(shape, np.int32),
    "loss_mask": np.zeros(shape, bool),
    "advantages": np.zeros(shape, np.float32),
    "old_logprobs": np.zeros(shape, np.float32),
  }
  for row, node in enumerate(np.flatnonzero(trained)):
    index = path_tokens(forest, node)
    rows["tokens"][row, : len(index)] = forest.tokens[index]
    own = slice(len(index) - forest.lengths[node], len(index))
    rows["loss_mask"][row, own] = True
    rows["advantages"][row, own] = advantages[node]
    rows["old_logprobs"][row, own] = forest.logprobs[slice(*forest.offsets[node : node + 2])]
  return rows


def causal(q, k, v, positions, context, cache, spec):
  """Attention of a plain sequence, with a dense mask; without window or cap."""
  del positions, context
  group = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
  scores = jnp.einsum("bthd,bshd->bhts", q, k) * spec.scale
  mask = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
  weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -1e30), axis=-1)
  return jnp.einsum("bhts,bshd->bthd", weights, v), cache


def sequence_logprobs(cfg, params, tokens) -> jax.Array:
  """[B, T] int32 -> [B, T - 1] float32: log-probs of tokens 1.. from all logits at once."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = forward(cfg, causal, params, tokens, positions)
  logprobs = jax.nn.log_softmax(token_logits(cfg, params, hidden[:, :-1]))
  return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def segment_rows_loss(cfg, params, rows):
  """Sum of the clipped surrogate (ε = 0.2) over the rows' loss tokens, and its gradient."""

  def loss(params):
    logprobs = sequence_logprobs(cfg, params, rows["tokens"])
    old, advantages, mask = (
      rows[name][:, 1:] for name in ("old_logprobs", "advantages", "loss_mask")
    )
    ratios = jnp.exp(logprobs - old)
    surrogate = jnp.minimum(ratios * advantages, jnp.clip(ratios, 0.8, 1.2) * advantages)
    return -jnp.sum(jnp.where(mask, surrogate, 0))

  return jax.value_and_grad(loss)(params)


def assert_trees_close(got, want, rtol: float) -> None:
  """Leaves agree up to `rtol` of the largest entry of the wanted leaf."""

  def close(path, a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error, scale = np.abs(a - b).max(), np.abs(b).max()
    assert error <= rtol * scale, f"{jax.tree_util.keystr(path)}: {error} of {scale}"

  jax.tree_util.tree_map_with_path(close, got, want)
