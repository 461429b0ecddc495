"""The supervised warm start: a policy that solves some problems, for RL to begin with.

It stops early on purpose: when sampled accuracy on the validation split reaches a target that
leaves RL most of the way.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from spo_jax.data import source
from spo_jax.errors import Stopped, UserError
from spo_jax.evaluation import accuracy
from spo_jax.forest import ForestBuilder
from spo_jax.infra import hosts, stopping
from spo_jax.infra.checkpoints import Checkpoints
from spo_jax.infra.mesh import shard_batch
from spo_jax.run import Run
from spo_jax.training import packing
from spo_jax.training.step import init_state, supervised_step

HISTORY_FILE = "warm_start.jsonl"


def pack_solutions(
  run: Run, records: Sequence[dict[str, Any]], cfg: packing.PackConfig
) -> tuple[packing.PackedForest, int]:
  """Packs worked solutions: each a tree of one path, the question and its solution.

  Returns:
    (batch, micro-batches in use).

  Raises:
    UserError: if a record has no solution, or one that is longer than a response may be.
  """
  builder = ForestBuilder()
  tokens, lengths = source.encode_prompts(
    run.task.tokenizer,
    [r["question"] for r in records],
    run.config.rollout.max_prompt_tokens,
    run.task.template,
  )
  roots = builder.add_roots(tokens, lengths)
  texts = [r["solution"] for r in records]
  solutions = source.encode_solutions(run.task.tokenizer, texts, run.task.template)
  joined, lengths = np.concatenate(solutions), np.array([len(s) for s in solutions])
  if lengths.max() > (allowed := run.config.rollout.max_response_tokens):
    raise UserError(
      f"a worked solution has {lengths.max()} tokens, more than the {allowed} of "
      "config.rollout.max_response_tokens: the policy could not repeat it"
    )
  ended = np.ones(len(roots), bool)
  builder.add(roots, joined, np.zeros(len(joined)), lengths, ended, probe=False)
  forest = builder.build()
  batch, counts = packing.pack(forest, np.zeros(len(ended) * 2), forest.depth > 0, cfg)
  return batch, counts["micro_batches"]


def warm_start(run: Run) -> Any:
  """Trains, or resumes, or loads the parameters that RL starts from; cached in the workdir.

  Without steps to take these are the checkpoint's of `config.model`.

  Returns:
    Parameters, sharded.

  Raises:
    Stopped: if the process was asked to end.
  """
  config, cfg = run.config, run.config.warm_start
  if not cfg.max_steps:
    return run.initial_params()
  state = init_state(run.initial_params(), config.warm_start_optimizer)
  iterator = source.make_iterator(
    run.task.split("train"), batch_size=cfg.batch_size, seed=config.seed
  )
  held = run.task.held_out("validation", cfg.eval_prompts)
  checkpoints = Checkpoints(run.checkpoint_folder("warm_start"), keep=1)
  record = {"step": 0, "done": False, "history": []}
  newest = lambda step: checkpoints.restore(step, state)
  if (found := checkpoints.read_newest(newest, run.progress.note)) is not None:
    state, record = found
    iterator.set_state(record["iterator"])
  rows = config.packing
  paths = packing.PackConfig(rows.row_length, rows.rows, rows.query_block, rows.key_block)
  longest = [config.rollout.max_prompt_tokens, config.rollout.max_response_tokens]
  paths = packing.with_room(paths, longest, sum(longest), cfg.batch_size)
  with run.progress.bar("warm start", total=cfg.max_steps) as advance:
    advance(record["step"])
    while not record["done"]:
      for _ in range(cfg.eval_every):
        batch, count = pack_solutions(run, next(iterator), paths)
        state, loss = supervised_step(
          run.model,
          rows.logprob_chunk,
          config.warm_start_optimizer,
          state,
          shard_batch(run.mesh, batch),
          jnp.int32(count),
        )
        advance(1)
      step = record["step"] + cfg.eval_every
      solved = accuracy(run, state.params, held, temperature=config.rollout.temperature)
      line = {"step": step, "loss": float(loss), "validation_accuracy": solved}
      advance(0, loss=line["loss"], accuracy=solved)
      record = {
        "step": step,
        "done": solved >= cfg.target_accuracy or step >= cfg.max_steps,
        "history": [*record["history"], line],
        "iterator": iterator.get_state(),
      }
      checkpoints.save(step, state, record)
      if hosts.is_first():
        _write_history(run, record["history"])
      if hosts.any_of(stopping.asked()):
        checkpoints.close()
        raise Stopped(f"stopped in the warm start, after step {step}, which is saved")
  checkpoints.close()
  last = record["history"][-1]
  run.progress.note(
    f"warm start: {last['step']} steps, loss {last['loss']:.3f}, "
    f"sampled validation accuracy {last['validation_accuracy']:.3f}"
  )
  return state.params


def _write_history(run: Run, history: list[dict[str, float]]) -> None:
  text = "".join(json.dumps(line) + "\n" for line in history)
  (run.workdir / HISTORY_FILE).write_text(text)
