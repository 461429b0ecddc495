"""How forests grow: tree (SPO-tree, and GRPO as one level), chain (SPO-chain). Host code."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from spo_jax.forest import Forest, ForestBuilder
from spo_jax.infra import hosts
from spo_jax.sampling import verbs
from spo_jax.sampling.sampler import Sampler, child_keys, draw_keys

# [B, T] tokens, log-probs and mask -> [B, T] bool, True where a segment begins
# (`algorithms/partition.py`).
Partition = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Prompts:
  """A batch of prompts."""

  tokens: np.ndarray  # [R, P] int32, right-padded
  lengths: np.ndarray  # [R] int32
  keys: jax.Array  # [R] typed PRNG keys, one a prompt

  def take(self, rows: np.ndarray, width: int) -> "Prompts":
    """Those of some rows, padded to a width that holds them."""
    return Prompts(self.tokens[rows, :width], self.lengths[rows], self.keys[rows])


def grow_tree(
  sampler: Sampler, params, prompts: Prompts, *, branches: tuple[int, ...], budgets: tuple[int, ...]
) -> Forest:
  """SPO-tree: a node that used its whole budget gets `branches[depth]` children.

  A child has at most `budgets[depth]` tokens. A node that ends by itself is a leaf wherever it is;
  so is every node at the last depth. GRPO is the tree of one level: branches (G,) and budgets (the
  longest response,).
  """
  builder = ForestBuilder()
  nodes = builder.add_roots(prompts.tokens, prompts.lengths)
  prefix = sampler.prefill(params, prompts.tokens, prompts.lengths)
  grows = np.ones(len(nodes), bool)
  starts, fed, keys = prompts.lengths, _last_tokens(prompts.tokens, prompts.lengths), prompts.keys
  for level, (n, budget) in enumerate(zip(branches, budgets, strict=True)):
    last = level == len(branches) - 1
    keys = child_keys(keys, np.broadcast_to(np.arange(n), (len(grows), n)))
    spread = lambda x: np.repeat(x[:, None], n, axis=1).astype(np.int32)  # noqa: B023
    groups = verbs.Groups(
      row=None,
      starts=spread(starts),
      limits=spread(np.where(grows, budget, 0)),
      fed=spread(fed),
      keys=draw_keys(keys),
    )
    segments = sampler.decode(params, prefix, groups, max_new_tokens=budget, keep_cache=not last)
    host = hosts.fetch(segments._replace(cache=()))
    wanted = host.lengths > 0
    children = np.full(wanted.shape, -1, np.int32)
    children[wanted] = _add_segments(
      builder, np.repeat(nodes, n).reshape(-1, n)[wanted], host, wanted
    )
    if last:
      break
    survives = np.flatnonzero(wanted & ~host.finished)
    index = np.full(wanted.size, verbs.NO_GROUP, np.int32)
    index[: len(survives)] = survives
    prefix = sampler.extend(prefix, groups, segments, index)
    del segments  # their cache is in the prefixes now
    grows = index != verbs.NO_GROUP
    starts = np.where(grows, (groups.starts + host.lengths).reshape(-1)[index], 1)
    fed = np.where(grows, _last_tokens(host.tokens, host.lengths).reshape(-1)[index], 0)
    nodes, keys = children.reshape(-1)[index], keys.reshape(-1)[index]
  return builder.build()


def grow_chain(
  sampler: Sampler,
  params,
  prompts: Prompts,
  *,
  samples: int,
  probes: int,
  max_new_tokens: int,
  partition: Partition,
  cuts_per_group: int,
  probe: Callable[[Forest], np.ndarray] | None = None,
) -> Forest:
  """SPO-chain: trajectories cut into segments, and `probes` rollouts from each cut.

  A trajectory becomes a path of segment nodes; the probes hang off the node that ends at their cut
  (the prompt, if a cut precedes the first token). A prompt is probed once for all of its
  trajectories. Probes continue inside the trajectory's own cache: nothing is prefilled twice.

  Args:
    sampler: the compiled verbs.
    params: parameters of the policy.
    prompts: R prompts.
    samples: G, trajectories a prompt.
    probes: rollouts at a cut.
    max_new_tokens: longest response, of trajectories and of probes (what precedes the cut
      included).
    partition: where segments begin.
    cuts_per_group: cuts whose probes are decoded together against one trajectory.
    probe: tells of the forest of trajectories which prompts are probed, [R] bool; None: all are.

  Returns:
    The forest: prompts, segments, probes.
  """
  builder = ForestBuilder()
  roots = builder.add_roots(prompts.tokens, prompts.lengths)
  prefix = sampler.prefill(params, prompts.tokens, prompts.lengths)
  shape = (len(roots), samples)
  keys = child_keys(prompts.keys, np.broadcast_to(np.arange(samples), shape))
  last_of_prompt = _last_tokens(prompts.tokens, prompts.lengths)
  groups = verbs.Groups(
    row=None,
    starts=np.repeat(prompts.lengths[:, None], samples, axis=1).astype(np.int32),
    limits=np.full(shape, max_new_tokens, np.int32),
    fed=np.repeat(last_of_prompt[:, None], samples, axis=1).astype(np.int32),
    keys=draw_keys(keys),
  )
  segments = sampler.decode(params, prefix, groups, max_new_tokens=max_new_tokens, keep_cache=True)
  host = hosts.fetch(segments._replace(cache=()))
  tokens, logprobs = (x.reshape(-1, max_new_tokens) for x in (host.tokens, host.logprobs))
  mask = np.arange(max_new_tokens) < host.lengths.reshape(-1, 1)
  cuts = np.array(partition(tokens, logprobs, mask))
  before_cut = _add_paths(
    builder, np.repeat(roots, samples), tokens, logprobs, mask, cuts, host.finished
  )

  # The state before the first token is the prompt's own: one trajectory probes it for all.
  if probe is not None:
    cuts &= np.repeat(probe(builder.build()), samples)[:, None]
  first_of_prompt = np.cumsum(cuts[:, 0].reshape(shape), axis=1).reshape(-1) == 1
  cuts[:, 0] &= first_of_prompt
  prefix = sampler.extend(prefix, groups, segments, np.arange(len(mask), dtype=np.int32))
  del segments  # their cache is in the prefixes now
  for row, position in _deal_cuts(cuts, cuts_per_group):
    wanted = np.repeat(position >= 0, probes, axis=1)
    position = np.maximum(position, 0)
    trajectory = np.maximum(row, 0)
    spread = lambda x: np.repeat(x, probes, axis=1).astype(np.int32)
    cut_keys = child_keys(keys.reshape(-1)[trajectory], position)
    probe_keys = child_keys(
      cut_keys.reshape(-1), np.broadcast_to(np.arange(probes), (position.size, probes))
    )
    groups = verbs.Groups(
      row=row,
      starts=spread(prompts.lengths[trajectory // samples][:, None] + position),
      limits=np.where(wanted, max_new_tokens - spread(position), 0).astype(np.int32),
      fed=spread(
        np.where(
          position > 0,
          tokens[trajectory[:, None], position - 1],
          last_of_prompt[trajectory // samples][:, None],
        )
      ),
      keys=draw_keys(probe_keys.reshape(wanted.shape)),
    )
    host = hosts.fetch(
      sampler.decode(params, prefix, groups, max_new_tokens=max_new_tokens, keep_cache=False)
    )
    parents = spread(before_cut[trajectory[:, None], position])
    _add_segments(builder, parents[wanted], host, wanted, probe=True)
  return builder.build()


def _last_tokens(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """[...] the last of each of the right-padded sequences [..., T]; of an empty one, any."""
  last = np.maximum(lengths - 1, 0)[..., None]
  return np.take_along_axis(tokens, last, axis=-1)[..., 0]


def _add_segments(builder, parents, host: verbs.Segments, wanted, *, probe=False) -> np.ndarray:
  """Adds the wanted [Q, n] segments as nodes; returns their ids in row-major order."""
  mask = (np.arange(host.tokens.shape[-1]) < host.lengths[..., None]) & wanted[..., None]
  return builder.add(
    parents,
    host.tokens[mask],
    host.logprobs[mask],
    host.lengths[wanted],
    host.finished[wanted],
    probe=probe,
  )


def _add_paths(builder, roots, tokens, logprobs, mask, cuts, finished) -> np.ndarray:
  """Adds trajectories [B, T] as paths of segments.

  Returns:
    [B, T] int32; where a segment begins, the node that ends before it.
  """
  begins = cuts.copy()
  begins[:, 0] = True
  begins &= mask
  count = begins.sum(1)
  is_last = np.zeros(count.sum(), bool)
  is_last[np.cumsum(count) - 1] = True
  owner = (
    np.cumsum(begins.reshape(-1)).reshape(begins.shape) - 1
  )  # running index of the token's segment
  lengths = np.bincount(owner[mask], minlength=count.sum())
  first_id = builder.next_id
  first_segment = np.zeros(count.sum(), bool)
  first_segment[np.cumsum(count) - count] = True
  parents = np.where(first_segment, np.repeat(roots, count), first_id + np.arange(count.sum()) - 1)
  ends = np.where(is_last, np.repeat(finished.reshape(-1), count), False)
  builder.add(parents, tokens[mask], logprobs[mask], lengths, ends, probe=False)
  return parents[np.maximum(owner, 0)]


def _deal_cuts(cuts: np.ndarray, cuts_per_group: int):
  """Deals the cuts of each trajectory into groups, and the groups into batches of one shape.

  Groups with early cuts come first: their probes are the longest, and late batches end early.

  Args:
    cuts: [B, T] bool.
    cuts_per_group: c.

  Yields:
    (row [B] int32, NO_GROUP pads; position [B, c] int32, -1 pads).
  """
  trajectory, where = np.nonzero(cuts)
  rank = np.arange(len(where)) - np.searchsorted(trajectory, trajectory)
  place = rank % cuts_per_group
  group = np.cumsum(place == 0) - 1  # running number, in order of trajectories
  batches = -(-(group.max(initial=-1) + 1) // len(cuts))
  row = np.full(batches * len(cuts), verbs.NO_GROUP, np.int32)
  position = np.full((len(row), cuts_per_group), -1, np.int32)
  row[group] = trajectory
  position[group, place] = where
  early_first = np.argsort(np.where(row >= 0, position[:, 0], cuts.size), kind="stable")
  row, position = row[early_first], position[early_first]
  shape = (batches, len(cuts))
  yield from zip(row.reshape(shape), position.reshape(*shape, cuts_per_group), strict=True)
