"""VinePPO is a chain whose segments are steps, cut at a delimiter."""

import numpy as np
import pytest
import tokenizers
import transformers

from spo_jax.algorithms import partition
from spo_jax.run import delimiter_ids
from tests.algorithms import reference


def _path(values, rewards):
  """A path forest of steps, and the rewards that were given before each state.

  Our values are of whole responses: what was given so far is part of them.
  """
  so_far = np.concatenate([[0.0], np.cumsum(rewards)])
  probes = [[v + r] if np.isfinite(v) else [] for v, r in zip(values, so_far[:-1], strict=True)]
  return reference.path_forest(probes, score=so_far[-1]), so_far


@pytest.mark.parametrize("x64", [False, True])
def test_steps_of_the_reference(fixture_arrays, x64):
  data = fixture_arrays("vineppo_step_advantages")
  sizes = data["num_steps"]
  assert {"dense_rewards", "none_known", "last_two_missing"} <= set(data["case_name"])
  rows = lambda name: [row[:size] for row, size in zip(data[name], sizes, strict=True)]
  paths = [_path(*row) for row in zip(rows("values_in"), rows("step_reward"), strict=True)]
  forest, offsets = reference.concatenate([path for path, _ in paths])
  nodes, by_kind = reference.solve(forest, max_depth=int(forest.depth.max()), x64=x64)
  close = dict(rtol=1e-12, atol=1e-12) if x64 else dict(rtol=1e-5, atol=1e-6)
  for case, (_, so_far) in enumerate(paths):
    states = offsets[case] + np.arange(sizes[case] + 1)
    want = {name: data[name][case] for name in ("values_in", "values_filled", "advantages")}
    got = nodes.values[states] - so_far
    np.testing.assert_allclose(got, want["values_filled"][: len(states)], **close)
    missing = np.isnan(want["values_in"][: sizes[case]])
    np.testing.assert_array_equal(nodes.filled[states], [*missing, False])
    np.testing.assert_array_equal(nodes.known[states], [*~missing, True])
    got = by_kind["difference"][states[1:]]
    np.testing.assert_allclose(got, want["advantages"][: sizes[case]], **close)


def _tokenize(record, delimiter):
  """The response's tokens when steps end in the delimiter: (ids, their tokenizer).

  The reference maps by position alone, whatever the characters are.
  """
  text = ["x"] * len(record["response_text"])
  for step in record["step_indices"][1:-1]:
    text[step - 1] = delimiter
  prompt = len(record["query_text"])
  offsets = np.array(record["token_offsets"][record["num_query_offsets"] :]) - prompt
  offsets[0, 0] = max(offsets[0, 0], 0)  # a token that begins in the prompt
  pieces = ["".join(text[begin:end]) for begin, end in offsets]
  pieces += ["<eos>"] * record["response_has_eos"]
  vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(["<unk>", *pieces]))}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  backend.decoder = tokenizers.decoders.Fuse()
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
  return np.array([[vocabulary[piece] for piece in pieces]], np.int32), offsets, tokenizer


def test_tokens_of_steps_of_the_reference():
  records = reference.load_json("vineppo_token_mapping")
  paths, segments = [], []
  for record in records:
    tokens, offsets, tokenizer = _tokenize(record, "\n")
    values = np.array(record["values"], float)
    ids = delimiter_ids(tokenizer, "\n") if len(values) > 1 else ()
    starts = partition.delimiters(tokens, np.ones_like(tokens, bool), delimiter_ids=ids)
    step = np.searchsorted(record["step_indices"], offsets[:, 0], side="right") - 1
    begins = np.flatnonzero(np.diff(step, prepend=-1))
    np.testing.assert_array_equal(np.flatnonzero(starts[0]), begins)
    without_token = np.setdiff1d(np.arange(len(values)), step)
    assert np.isnan(values[without_token]).all()  # an estimate would divide the step before it
    rewards = [*[0] * (len(begins) - 1), sum(record["step_rewards"])]
    paths.append(_path(values[step[begins]], rewards)[0])
    segments.append(np.asarray(partition.segment_index(starts))[0])
  assert max(len(record["values"]) for record in records) == 3

  forest, roots = reference.concatenate(paths)
  _, by_kind = reference.solve(forest, max_depth=int(forest.depth.max()))
  for record, root, segment in zip(records, roots, segments, strict=True):
    got = by_kind["difference"][root + segment]
    np.testing.assert_allclose(got, record["token_advantages"], atol=1e-6)
