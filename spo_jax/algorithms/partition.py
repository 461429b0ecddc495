"""Where segments begin: the paper's segment partition.

Every partition returns `starts`, [B, T] bool: True where a token begins a segment whose start
state is to be valued. Token index t corresponds to the cut point t - 1 of the reference, "the
state after response tokens 0..t-1". A row holds one response, its tokens contiguous in `mask`;
prompt tokens and padding around it are not in the mask and never start a segment.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.algorithms import masking


def _rank(mask: jax.Array) -> jax.Array:
  """[B, T] bool -> [B, T] int32: the place of a token among the tokens of its row's mask."""
  chex.assert_rank(mask, 2)
  chex.assert_type(mask, bool)
  return jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1


def cutpoints(
  logprobs: jax.Array, mask: jax.Array, *, threshold: float, interval: int
) -> jax.Array:
  """Adaptive partition: a segment begins at every k-th token of probability below ρ.

  With l₀ < l₁ < ... the tokens with p < ρ, the starts are lⱼₖ, j = 0, 1, ... Every segment after
  the first start holds k of them (the last one 1 to k), so segments are equal in cutpoints, not
  in tokens. Tokens before l₀ belong to no valued segment. `masking.probability_mask` tells how
  p < ρ is decided at the threshold itself.

  Args:
    logprobs: [B, T] float, log-probabilities under the behaviour policy.
    mask: [B, T] bool, the response tokens.
    threshold: ρ, a Python float.
    interval: k >= 1, cutpoints in a segment.

  Returns:
    starts, [B, T] bool.

  Raises:
    ValueError: If threshold or interval is not positive.
  """
  if interval < 1:
    raise ValueError(f"interval must be positive, got {interval}")
  low = masking.probability_mask(logprobs, mask, threshold=threshold)
  return low & (_rank(low) % interval == 0)


def fixed_length(mask: jax.Array, *, length: int) -> jax.Array:
  """Fixed partition: a segment begins at response tokens 0, M, 2M, ...

  Args:
    mask: [B, T] bool, the response tokens.
    length: M >= 1, tokens in a segment.

  Returns:
    starts, [B, T] bool.

  Raises:
    ValueError: If length is not positive.
  """
  if length < 1:
    raise ValueError(f"length must be positive, got {length}")
  return mask & (_rank(mask) % length == 0)


def equal_parts(mask: jax.Array, *, parts: int) -> jax.Array:
  """Naive partition: n consecutive parts of R // n tokens, the first R mod n with one more.

  The reference's ablation with "3 cut points" is n = 4. It never values the state before the first
  token and so leaves the first part untrained; here that state is a start like the others. A
  response of R < n tokens has R parts of one token each, without the reference's repeated cuts.

  Args:
    mask: [B, T] bool, the response tokens.
    parts: n >= 1.

  Returns:
    starts, [B, T] bool.

  Raises:
    ValueError: If parts is not positive.
  """
  if parts < 1:
    raise ValueError(f"parts must be positive, got {parts}")
  rank = _rank(mask)
  length = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32)
  size, longer = length // parts, length % parts
  in_longer = rank < longer * (size + 1)
  begins = jnp.where(in_longer, rank % (size + 1) == 0, (rank - longer) % jnp.maximum(size, 1) == 0)
  return mask & begins


def token_level(mask: jax.Array) -> jax.Array:
  """Every response token is a segment: [B, T] bool -> starts, [B, T] bool."""
  return fixed_length(mask, length=1)


def whole_response(mask: jax.Array) -> jax.Array:
  """The response is one segment: [B, T] bool -> starts, [B, T] bool."""
  return mask & (_rank(mask) == 0)


def delimiters(tokens: jax.Array, mask: jax.Array, *, delimiter_ids: tuple[int, ...]) -> jax.Array:
  """A segment begins at response token 0 and after every token that holds a delimiter.

  So a token belongs to the step that its first character is in, as in VinePPO
  (https://arxiv.org/abs/2410.01679), and a step that begins and ends inside one token is none. An
  end-of-sequence token right behind a delimiter is a segment; VinePPO adds it to the step before.

  Args:
    tokens: [B, T] int32, not negative.
    mask: [B, T] bool, the response tokens.
    delimiter_ids: tokens with the delimiter in their text; see `run.delimiter_ids`.

  Returns:
    starts, [B, T] bool.
  """
  chex.assert_equal_shape([tokens, mask])
  chex.assert_type(tokens, int)
  # A table, since a vocabulary may hold thousands of tokens with a line break.
  table = np.zeros(max(delimiter_ids, default=0) + 1, bool)
  table[list(delimiter_ids)] = True
  ends = jnp.asarray(table).at[tokens].get(mode="fill", fill_value=False)
  after = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
  return whole_response(mask) | (mask & after)


def segment_index(starts: jax.Array) -> jax.Array:
  """Number of segments begun up to and including a token; 0 before the first start.

  Args:
    starts: [B, T] bool.

  Returns:
    [B, T] int32.
  """
  chex.assert_rank(starts, 2)
  chex.assert_type(starts, bool)
  return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


PARTITIONS: dict[str, Callable[..., jax.Array]] = {
  "adaptive": lambda tokens, logprobs, mask, *, threshold, interval, **_: cutpoints(
    logprobs, mask, threshold=threshold, interval=interval
  ),
  "fixed": lambda tokens, logprobs, mask, *, length, **_: fixed_length(mask, length=length),
  "equal": lambda tokens, logprobs, mask, *, parts, **_: equal_parts(mask, parts=parts),
  "token": lambda tokens, logprobs, mask, **_: token_level(mask),
  "response": lambda tokens, logprobs, mask, **_: whole_response(mask),
  "delimiter": lambda tokens, logprobs, mask, *, delimiter_ids, **_: delimiters(
    tokens, mask, delimiter_ids=delimiter_ids
  ),
}


def make_partition(
  kind: str,
  *,
  threshold: float,
  interval: int,
  length: int,
  parts: int,
  delimiter_ids: tuple[int, ...],
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
  """Looks a partition up by name and binds its hyper-parameters.

  Args:
    kind: a key of `PARTITIONS`.
    threshold: for "adaptive", see `cutpoints`.
    interval: for "adaptive", see `cutpoints`.
    length: for "fixed", see `fixed_length`.
    parts: for "equal", see `equal_parts`.
    delimiter_ids: for "delimiter", see `delimiters`.

  Returns:
    A function (tokens, logprobs, mask) -> starts, all [B, T].

  Raises:
    ValueError: If kind is unknown.
  """
  if kind not in PARTITIONS:
    raise ValueError(f"unknown partition {kind!r}, one of {sorted(PARTITIONS)}")
  return functools.partial(
    PARTITIONS[kind],
    threshold=threshold,
    interval=interval,
    length=length,
    parts=parts,
    delimiter_ids=delimiter_ids,
  )
