"""The benchmark of the sampler at a tiny size: every engine draws what is asked for."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers, sampling

TINY = "--layers 1 --width 32 --vocab 48 --prompt 5 --new 2 --repeats 2"


def record(capsys, words):
  assert sampling.main([*TINY.split(), *words.split()]) == 0
  (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
  return json.loads(line)


def test_continuations_and_trees_are_counted(capsys):
  engines = record(capsys, "--batch 24 --samples 3 --peers")["engines"]
  assert {name: one["tokens"] for name, one in engines.items()} == {"ours": 48, "plain": 48}
  assert all(len(one["seconds"]) == 2 for one in engines.values())
  engines = record(capsys, "--batch 8 --tree 3 2")["engines"]
  tokens = 8 * (3 + 6) * 2
  assert {name: one["tokens"] for name, one in engines.items()} == {"ours": tokens, "plain": tokens}


def test_a_peer_that_is_not_installed_is_left_out_with_a_word(capsys, monkeypatch):
  monkeypatch.setattr(peers.HuggingFace, "needs", ("no_such_package",))
  assert sampling.main([*TINY.split(), "--batch", "8", "--peers", "hf"]) == 0
  printed = capsys.readouterr()
  assert "hf is left out: no_such_package is not installed" in printed.err
  assert '"engines": {"ours"' in printed.out and '"hf": {' not in printed.out


def test_hugging_face_draws_from_our_weights():
  if gone := peers.missing("hf"):
    pytest.skip(f"{', '.join(gone)} is not installed")
  model = peers.random_model(1, 32, 48)
  params = model.params
  # Blocks that do nothing, and one token that is all but certain: who has these weights draws it.
  params["block_0"] |= {name: 0 * params["block_0"][name] for name in ("out", "down")}
  params["embedding"] = jnp.ones_like(params["embedding"])
  params["unembedding"] = jnp.zeros_like(params["unembedding"]).at[:, 7].set(1.0)
  (engine,) = peers.load(peers.PEERS, ["hf"], model, 16).values()
  prompts = np.full((8, 5), 3)
  ours = sampling.Ours(model.cfg, params, 24, shared=True).sample(prompts, 3, 4, 0)
  drawn = engine(prompts, 3, 4, 0)
  assert drawn.shape == ours.shape == (8, 3, 4)
  assert (drawn == 7).all() and (ours == 7).all()


def test_wrong_sizes_are_told(capsys):
  for words, told in (("--batch 12", "8 devices cannot divide"), ("--width 34", "--width 34")):
    assert sampling.main([*TINY.split(), "--peers", "--batch", "8", *words.split()]) == 2
    assert told in capsys.readouterr().err
  for words in ("--batch 5 --samples 2", "--tree 2 --samples 2 --batch 2"):
    with pytest.raises(SystemExit):
      sampling.parse_args(words.split())
