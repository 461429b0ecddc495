import dataclasses

import jax
import numpy as np
import pytest

from spo_jax.sampling import decoding
from spo_jax.sampling.sampler import compiled_programs
from spo_jax.sampling.verbs import NO_GROUP, NOWHERE, Groups
from tests.sampling.reference import assert_drawn_from, causal_logprobs
from tests.tiny import EOS, VOCAB, tiny_config, tiny_params, tiny_prompts, tiny_sampler

R, P, Q, N, S = 8, 6, 8, 3, 8  # Q is 7 groups and one of padding
TEMPERATURE = 0.8
CFG = tiny_config()


@pytest.fixture(scope="module")
def params():
  return tiny_params(CFG)


@pytest.fixture(scope="module")
def prompts():
  return tiny_prompts(R, longest=P)


def sampler(**options):
  return tiny_sampler(CFG, temperature=TEMPERATURE, top_p=0.98, **options)


@pytest.fixture(scope="module")
def prefix(params, prompts):
  return sampler().prefill(params, prompts.tokens, prompts.lengths)


def make_groups(tokens, lengths, seed=0, *, groups=Q, n=N):
  """Groups of random rows; continuations that start anywhere in the prefix, with any limits.

  Args:
    tokens: [R, C] of the prefixes.
    lengths: [R] of them.
    seed: of all that is random.
    groups: number of groups.
    n: continuations of each.
  """
  rng = np.random.default_rng(seed)
  row = rng.integers(0, len(lengths), groups).astype(np.int32)
  starts = rng.integers(1, lengths[row][:, None] + 1, (groups, n)).astype(np.int32)
  starts[0] = lengths[row[0]]
  limits = rng.integers(1, S + 1, (groups, n)).astype(np.int32)
  limits[1, 0] = 0
  limits[2] = 0
  limits[3] = S
  row[-1], limits[-1] = NO_GROUP, 0
  keys = jax.random.split(jax.random.key(seed), (groups, n))
  return Groups(row, starts, limits, tokens[row[:, None], starts - 1], keys)


def decode(params, prefix, groups, **options):
  return sampler(**options).decode(params, prefix, groups, max_new_tokens=S, keep_cache=True)


@pytest.fixture(scope="module")
def groups(prompts):
  return make_groups(prompts.tokens, prompts.lengths)


@pytest.fixture(scope="module")
def segments(params, prefix, groups):
  """All groups at once."""
  return decode(params, prefix, groups)


def everything(groups):
  """[Q * n] indices for `extend`: every continuation of a wanted group."""
  index = np.arange(groups.row.size * groups.starts.shape[1], dtype=np.int32)
  return np.where(np.repeat(groups.row >= 0, groups.starts.shape[1]), index, NO_GROUP)


def drawn(segments):
  """[Q, n, S] bool."""
  return np.arange(segments.tokens.shape[-1]) < segments.lengths[..., None]


def sequences(seen, groups, segments):
  """(tokens [Q * n, C + S], lengths): what continuations saw of prefixes [R, C], and drew."""
  groups, segments = jax.device_get((groups._replace(keys=0), segments._replace(cache=())))
  tokens = np.zeros((groups.starts.size, seen.shape[1] + S), np.int32)
  lengths = (groups.starts + segments.lengths).reshape(-1)
  for i, (start, drew) in enumerate(zip(groups.starts.flat, lengths, strict=True)):
    q, child = divmod(i, groups.starts.shape[1])
    tokens[i, :start] = seen[groups.row[q], :start]
    tokens[i, start:drew] = segments.tokens[q, child, : drew - start]
  return tokens, lengths


def logprob_gap(params, seen, groups, segments):
  """Largest difference to the log-probs of a plain causal pass."""
  segments = jax.device_get(segments._replace(cache=()))
  tokens, _ = sequences(seen, groups, segments)
  every = np.asarray(causal_logprobs(CFG, params, tokens, TEMPERATURE))
  gap = 0.0
  for q, child in np.argwhere(groups.row[:, None] + 0 * groups.starts >= 0):
    i, count = q * groups.starts.shape[1] + child, segments.lengths[q, child]
    at = groups.starts[q, child] - 1 + np.arange(count)
    want = every[i, at, segments.tokens[q, child, :count]]
    gap = max(gap, np.abs(want - segments.logprobs[q, child, :count]).max(initial=0))
  return gap


def assert_same_segments(got, want, rows=slice(None), rows_of_want=slice(None)):
  got, want = (
    jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], s._replace(cache=()))
    for s, rows in ((got, rows), (want, rows_of_want))
  )
  np.testing.assert_array_equal(got.lengths, want.lengths)
  np.testing.assert_array_equal(got.finished, want.finished)
  mask = drawn(want)
  np.testing.assert_array_equal(got.tokens[mask], want.tokens[mask])
  np.testing.assert_allclose(got.logprobs[mask], want.logprobs[mask], atol=1e-5)


def in_order(prefix):
  """[R] lists: per token in order of positions, (position, its keys and values in all layers)."""
  positions = np.asarray(prefix.positions)
  by_slot = np.concatenate(
    [
      x
      for keys, values in jax.device_get(prefix.cache)
      for x in (keys.transpose(0, 3, 1, 2), values.swapaxes(1, 2))
    ],
    axis=2,
  )
  found = []
  for at, entries in zip(positions, by_slot, strict=True):
    slots = [slot for slot in np.argsort(at, kind="stable") if at[slot] != NOWHERE]
    found.append(([int(at[slot]) for slot in slots], entries[slots]))
  return found


def assert_holds(prefix, want, lengths):
  """A prefix holds the entries of another at positions 0 .. length - 2; the last may be absent."""
  for got, wanted, length in zip(in_order(prefix), in_order(want), lengths, strict=True):
    cached = max(length - 1, 0)
    assert got[0] == list(range(cached))
    np.testing.assert_allclose(got[1], wanted[1][:cached], atol=1e-5)


def assert_extends_to_prefill(params, seen, prefix, groups, segments):
  """`extend` gives what `prefill` of the same tokens gives; returns (prefixes, tokens, lengths)."""
  index = everything(groups)
  extended = sampler().extend(prefix, groups, segments, index)
  tokens, lengths = sequences(seen, groups, segments)
  drew = np.asarray(segments.lengths).reshape(-1) > 0
  lengths = np.where((index >= 0) & drew, lengths, 0).astype(np.int32)
  assert_holds(extended, sampler().prefill(params, tokens, np.maximum(lengths, 1)), lengths)
  return extended, tokens, lengths


def test_logprobs_are_those_of_a_causal_pass(params, prompts, prefix, groups, segments):
  """After `prefill`, and after `extend`, from the end of the prefix or from inside it."""
  assert logprob_gap(params, prompts.tokens, groups, segments) < 1e-4
  extended = sampler().extend(prefix, groups, segments, everything(groups))
  tokens, lengths = sequences(prompts.tokens, groups, segments)
  drew = np.flatnonzero(np.asarray(segments.lengths).reshape(-1) > 0)
  deeper = make_groups(tokens[drew], lengths[drew], seed=1)
  deeper = deeper._replace(row=np.where(deeper.row >= 0, drew[deeper.row], NO_GROUP))
  assert (deeper.starts < lengths[deeper.row][:, None]).any()
  assert logprob_gap(params, tokens, deeper, decode(params, extended, deeper)) < 1e-4


@pytest.mark.parametrize("suffix_chunks", [1, 3, 4])
def test_chunks_of_the_suffix_change_nothing(params, prefix, groups, segments, suffix_chunks):
  other = decode(params, prefix, groups, suffix_chunks=suffix_chunks)
  assert {len(chunks) for chunks in other.cache} == {suffix_chunks}
  assert_same_segments(other, segments)
  index = everything(groups)
  extend = lambda segments: sampler().extend(prefix, groups, segments, index)
  got, want = extend(other), extend(segments)
  np.testing.assert_array_equal(got.positions, want.positions)
  there = np.asarray(want.positions != NOWHERE)
  for (keys, values), (wanted_keys, wanted_values) in zip(got.cache, want.cache, strict=True):
    for x, y in ((keys.swapaxes(2, 3), wanted_keys.swapaxes(2, 3)), (values, wanted_values)):
      pick = lambda x: np.asarray(x).swapaxes(1, 2)[there]
      np.testing.assert_allclose(pick(x), pick(y), atol=1e-5)


def test_a_group_may_continue_the_prefix_of_its_number(params, prefix, prompts):
  """Without a row, for all at once, with refill and in waves."""
  groups = make_groups(prompts.tokens, prompts.lengths)._replace(row=np.arange(R, dtype=np.int32))
  starts = np.minimum(groups.starts, prompts.lengths[:, None])
  groups = groups._replace(starts=starts, fed=prompts.tokens[groups.row[:, None], starts - 1])
  want = decode(params, prefix, groups)
  for options in ({}, {"slots": 3}, {"slots": 3, "refill_share": 1.0}):
    same = decode(params, prefix, groups._replace(row=None), **options)
    assert_same_segments(same, want)
    index = np.arange(R * N, dtype=np.int32)
    got = sampler().extend(prefix, groups._replace(row=None), same, index)
    lengths = np.where(np.asarray(want.lengths) > 0, starts + want.lengths, 0)
    assert_holds(got, sampler().extend(prefix, groups, want, index), lengths.reshape(-1))


def test_ends_and_limits(groups, segments):
  wanted = groups.row >= 0
  lengths, finished = (np.asarray(x)[wanted] for x in (segments.lengths, segments.finished))
  tokens, limits = np.asarray(segments.tokens)[wanted], groups.limits[wanted]
  assert (lengths <= limits).all() and (lengths[limits == 0] == 0).all()
  assert (lengths[limits > 0] > 0).all() and (lengths[~finished] == limits[~finished]).all()
  is_eos = (tokens == EOS) & (np.arange(S) < lengths[..., None])
  np.testing.assert_array_equal(is_eos.sum(-1), finished)
  np.testing.assert_array_equal(is_eos.argmax(-1)[finished], lengths[finished] - 1)
  assert finished.any() and (lengths[finished] < limits[finished]).any()
  assert not np.asarray(segments.lengths)[~wanted].any()


@pytest.mark.parametrize("slots, refill_share", [(2, 0.25), (3, 0.5), (3, 1.0)])
def test_refill_and_waves_change_nothing(
  params, prompts, prefix, groups, segments, slots, refill_share
):
  refilled = decode(params, prefix, groups, slots=slots, refill_share=refill_share)
  assert_same_segments(refilled, segments)
  assert_extends_to_prefill(params, prompts.tokens, prefix, groups, refilled)
  assert (np.asarray(refilled.first)[:-1] > 0).any() == (refill_share < 1)


def test_a_refill_leaves_the_groups_alone_that_run(params, prefix, groups):
  """After three steps slots 1 to 3 are refilled two at a time; slot 0 has group 4, a long one."""
  steps = np.array([1, 1, 3, 3, S, 1, 2, 2, 2, 2], np.int32)
  many = jax.tree.map(lambda x: x[np.arange(len(steps)) % (Q - 1)], groups)
  many = many._replace(limits=np.tile(steps[:, None], (1, N)))
  endless = lambda **options: dataclasses.replace(sampler(**options), stop_ids=(VOCAB,))
  draw = lambda sampler: sampler.decode(params, prefix, many, max_new_tokens=S, keep_cache=True)
  refilled = draw(endless(slots=4, refill_share=0.5))
  np.testing.assert_array_equal(refilled.first, [0, 0, 0, 0, 1, 1, 3, 3, 3, 5])
  assert_same_segments(refilled, draw(endless()))


def counted(monkeypatch, name):
  """A list that grows by one whenever the compiled `decoding` function of this name runs."""
  runs = []
  function = getattr(decoding, name)

  def count(*args, **options):
    jax.debug.callback(lambda: runs.append(1))
    return function(*args, **options)

  monkeypatch.setattr(decoding, name, count)
  return runs


def run_decode(params, prefix, groups, decode_cfg):
  segments = jax.jit(lambda *args: decoding.decode(CFG, decode_cfg, *args))(params, prefix, groups)
  jax.block_until_ready(segments)
  jax.effects_barrier()


def test_waves_end_with_the_groups(params, prefix, groups, monkeypatch):
  """Eight groups, of which three want anything, are one wave of four."""
  few = groups._replace(limits=np.where(np.arange(Q)[:, None] < 3, groups.limits, 0))
  waves = counted(monkeypatch, "_wave")
  decode_cfg = sampler(slots=4, refill_share=1.0).decode_config(S, False)
  for asked, count in ((few, 1), (groups, 2)):
    waves.clear()
    run_decode(params, prefix, asked, decode_cfg)
    assert len(waves) == count


@pytest.mark.parametrize("slots, steps", [(64, 5), (4, 8)], ids=["at once", "refilled"])
def test_steps_end_with_the_longest_continuation(params, prefix, groups, monkeypatch, slots, steps):
  """With limits of at most 5 and 3: at once 5 steps, in slots of 4 groups 5 and 3 more."""
  most = np.where(np.arange(Q)[:, None] < 4, 5, 3)
  groups = groups._replace(limits=np.minimum(np.full_like(groups.limits, S), most))
  decode_cfg = sampler(slots=slots, refill_share=1.0 if slots == 64 else 0.9)
  decode_cfg = dataclasses.replace(decode_cfg, stop_ids=(VOCAB,)).decode_config(S, False)
  taken = counted(monkeypatch, "decode_step")
  run_decode(params, prefix, groups, decode_cfg)
  assert len(taken) == steps


def test_a_prefix_holds_its_prompt(prompts, prefix):
  for (positions, _), length in zip(in_order(prefix), prompts.lengths, strict=True):
    assert positions == list(range(length))


@pytest.mark.parametrize("slots", [64, 2])
def test_order_of_groups_changes_nothing(params, prefix, groups, segments, slots):
  order = np.append(np.random.default_rng(4).permutation(Q - 1), Q - 1)
  permuted = jax.tree.map(lambda x: x[order], groups)
  result = decode(params, prefix, permuted, slots=slots, refill_share=0.25)
  assert_same_segments(result, segments, rows_of_want=order)


def test_number_of_groups_changes_nothing(params, prefix, groups, segments):
  alone = jax.tree.map(lambda x: x[3:4], groups)
  assert_same_segments(decode(params, prefix, alone), segments, rows_of_want=slice(3, 4))


def test_extend_is_prefill_of_the_same_tokens(params, prompts, prefix, groups, segments):
  extended, _, lengths = assert_extends_to_prefill(params, prompts.tokens, prefix, groups, segments)
  assert (np.asarray(extended.positions)[-N:] == NOWHERE).all()
  # Survivors in any order, with padding.
  index = np.full(Q * N, NO_GROUP, np.int32)
  index[:4] = survivors = [9, 2, 11, 0]
  chosen = sampler().extend(prefix, groups, segments, index)
  got, want = in_order(chosen), in_order(extended)
  for place, survivor in enumerate(survivors):
    assert got[place][0] == want[survivor][0]
    np.testing.assert_array_equal(got[place][1], want[survivor][1])
  assert all(not at for at, _ in got[4:])


def test_an_idle_group_keeps_its_suffix_while_the_ring_turns(params, prefix, prompts):
  """The first group ends at step 8 and waits for one that enters at step 7 and takes 8 steps."""
  never_ends = dataclasses.replace(sampler(slots=2), stop_ids=(VOCAB,))
  groups = make_groups(prompts.tokens, prompts.lengths, seed=2)
  limits = np.zeros((Q, N), np.int32)
  limits[:3] = [[S] * N, [S - 1, 2, 0], [S] * N]
  row = np.where(np.arange(Q) < 3, np.maximum(groups.row, 0), NO_GROUP).astype(np.int32)
  groups = groups._replace(row=row, limits=limits)
  segments = never_ends.decode(params, prefix, groups, max_new_tokens=S, keep_cache=True)
  np.testing.assert_array_equal(segments.lengths, limits)
  assert list(segments.first[:3]) == [0, 0, S - 1]
  assert logprob_gap(params, prompts.tokens, groups, segments) < 1e-4
  assert_extends_to_prefill(params, prompts.tokens, prefix, groups, segments)


def test_any_stop_token_ends_a_continuation(params, prefix, groups, segments):
  """With a second stop token, every continuation is the old one up to the first of either."""
  tokens, lengths = np.asarray(segments.tokens), np.asarray(segments.lengths)
  drawn = tokens[np.arange(S) < lengths[..., None] - 1]  # but for the last ones, EOS among them
  other = int(np.bincount(drawn).argmax())
  stopped = dataclasses.replace(sampler(), stop_ids=(EOS, other)).decode(
    params, prefix, groups, max_new_tokens=S, keep_cache=False
  )
  cut = 0
  for where in np.ndindex(lengths.shape):
    row = tokens[where][: lengths[where]].tolist()
    length = row.index(other) + 1 if other in row else len(row)
    cut += length < len(row)
    assert stopped.lengths[where] == length
    assert stopped.tokens[where][:length].tolist() == row[:length]
    assert bool(stopped.finished[where]) == (length > 0 and row[length - 1] in (EOS, other))
  assert cut > 0


def test_other_values_compile_nothing_anew(params, prefix, prompts, groups, segments):
  sampler().extend(prefix, groups, segments, everything(groups))
  before = compiled_programs()
  other = tiny_prompts(R, longest=P, seed=7)
  prefix = sampler().prefill(tiny_params(CFG, seed=3), other.tokens, other.lengths)
  groups = make_groups(other.tokens, other.lengths, seed=8)
  segments = decode(params, prefix, groups)
  sampler().extend(prefix, groups, segments, np.full(Q * N, NO_GROUP, np.int32))
  assert compiled_programs() == before


def test_two_tokens_follow_the_exact_distribution():
  """Many keys from two states of one prompt, one of them inside it, against enumeration."""
  V, groups, n = 8, 32, 64
  cfg = tiny_config(vocab_size=V)
  params = tiny_params(cfg)
  params["unembedding"] *= 0.3
  prompt = np.array([[3, 5, 2, 7]], np.int32)
  small = tiny_sampler(cfg, slots=8, temperature=0.7)
  prefix = small.prefill(params, prompt, np.array([4], np.int32))
  starts = np.where(np.arange(groups)[:, None] < groups // 2, 4, 2) + np.zeros((1, n), int)
  asked = Groups(
    row=np.zeros(groups, np.int32),
    starts=starts.astype(np.int32),
    limits=np.full((groups, n), 2, np.int32),
    fed=prompt[0, starts - 1],
    keys=jax.random.split(jax.random.key(5), (groups, n)),
  )
  segments = small.decode(params, prefix, asked, max_new_tokens=2, keep_cache=False)
  first, second = np.moveaxis(np.asarray(segments.tokens), -1, 0)
  second = np.where(np.asarray(segments.lengths) == 1, 0, second)
  for start in (4, 2):
    following = np.concatenate([prompt[:, :start].repeat(V, 0), np.arange(V)[:, None]], axis=1)
    following = np.pad(following, ((0, 0), (0, 5 - following.shape[1]))).astype(np.int32)
    logprobs = np.asarray(causal_logprobs(cfg, params, following, 0.7))
    exact = np.exp(logprobs[:, start - 1, :].diagonal()[:, None] + logprobs[:, start, :])
    exact[EOS] = 0
    exact[EOS, 0] = np.exp(logprobs[EOS, start - 1, EOS])
    np.testing.assert_allclose(exact.sum(), 1, rtol=1e-5)
    assert (exact * groups * n / 2 >= 5).sum() > 40, "too few outcomes to tell"
    counts = np.zeros((V, V))
    np.add.at(counts, (first[starts == start], second[starts == start]), 1)
    assert_drawn_from(counts, exact)
