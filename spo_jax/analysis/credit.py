"""How well methods assign credit, at a policy that a workdir holds: advantages and gradients.

  python -m spo_jax.analysis.credit --workdir=runs/spo_tree --out=runs/credit

The truth is found by brute force: rollouts from every token of a few trajectories, and the policy
gradient of a large sample. Methods are judged at equal sampled tokens. Writes credit.json,
credit.md and, where matplotlib is installed, pictures. No run may be going on in the workdir.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from spo_jax.analysis import alignment, gradients, pictures, policy, tables, values
from spo_jax.analysis.truth import sample_trajectories, self_check
from spo_jax.command_line import USER_ERROR_STATUS
from spo_jax.data import source
from spo_jax.errors import UserError
from spo_jax.infra.progress import Progress, compact
from spo_jax.run import Run, make_run

TRUE_GRADIENT = (
  "true: configs/rloo.py advantage.train_zero=True loss.normalization=constant "
  "loss.use_probability_mask=False"
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m spo_jax.analysis.credit",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--workdir", type=pathlib.Path, required=True, help="of a run that is not going on")
  add("--out", type=pathlib.Path, required=True, help="folder for what is found")
  add("--policy", choices=(policy.CHECKPOINT, policy.WARM_START), default=policy.CHECKPOINT)
  add("--split", default="train", help="whose prompts are sampled")
  add("--method", action="append", help="'NAME: FILE FIELD=VALUE ...'; may be given several times")
  add("--seed", type=int, default=1)
  truth = parser.add_argument_group("true advantages")
  truth.add_argument("--prompts", type=int, default=8)
  truth.add_argument("--samples", type=int, default=4, help="trajectories a prompt")
  truth.add_argument("--rollouts", type=int, default=96, help="from each state, even")
  truth.add_argument("--prompts_at_once", type=int, default=4, help="bounds the memory")
  judged = parser.add_argument_group("advantages of methods")
  judged.add_argument(
    "--shares", type=int, nargs="+", default=(200, 400, 800), help="tokens a prompt"
  )
  judged.add_argument("--draws", type=int, default=32, help="of a method's rollouts")
  judged.add_argument("--children", type=int, default=32, help="subtrees sampled at a state, even")
  judged.add_argument("--rank_tokens", type=int, default=13, help="of the continuations ranked")
  update = parser.add_argument_group("gradients")
  update.add_argument("--budgets", type=int, nargs="*", default=(4096, 16384, 65536))
  update.add_argument("--batches", type=int, default=48, help="of the first budget, a method")
  update.add_argument("--true_tokens", type=int, default=1_500_000, help="of the true gradient")
  update.add_argument("--true_parts", type=int, default=32, help="independent ones, for its error")
  update.add_argument("--sampled_at_once", type=int, default=96, help="prompts")
  args = parser.parse_args(argv)
  _check(args)
  return args


def _check(args: argparse.Namespace) -> None:
  """Raises UserError for sizes that cannot work."""
  least = {"prompts": 2, "samples": 1, "rollouts": 4, "children": 4, "draws": 2, "batches": 4}
  least |= {"prompts_at_once": 1, "true_parts": 4, "sampled_at_once": 1, "rank_tokens": 1}
  for name, value in least.items():
    if getattr(args, name) < value:
      raise UserError(f"--{name} is {getattr(args, name)}, it must be at least {value}")
  for name in ("rollouts", "children"):
    if getattr(args, name) % 2:
      raise UserError(f"--{name} is {getattr(args, name)}, it must be even: it is halved")
  if any(b % args.budgets[0] for b in args.budgets):
    raise UserError(f"--budgets {args.budgets}: each must be a multiple of the first")
  if args.budgets and max(args.budgets) // args.budgets[0] * 2 > args.batches:
    raise UserError(f"--batches {args.batches} are less than two updates of the largest budget")


def main(argv: Sequence[str] | None = None) -> int:
  """Judges the methods; returns the exit status."""
  try:
    args = parse_args(argv)
    base, variant = policy.read_config(args.workdir)
    methods = policy.parse_methods(args.method or policy.METHODS, base, variant)
    true_method = policy.parse_methods([TRUE_GRADIENT], base, variant)[0]
    args.out.mkdir(parents=True, exist_ok=True)
    with (
      Progress(1) as progress,
      contextlib.closing(make_run(base, args.workdir.absolute(), progress)) as run,
    ):
      params, critic_params = policy.load_policy(run, args.policy)
      for method in methods:
        if method.config.critic.trunk != "none" and critic_params is None:
          raise UserError(f"method {method.name!r} has a critic, and the workdir's policy has none")
      report = judge(args, run, params, critic_params, methods, true_method)
      progress.note(report)
      progress.note(f"written to {args.out}")
  except UserError as error:
    print(f"spo_jax: {error}", file=sys.stderr)
    return USER_ERROR_STATUS
  return 0


def judge(args, run: Run, params, critic_params, methods, true_method) -> str:
  """Advantages, gradients, files; returns the page."""
  bench, report = make_bench(args, run, params)
  check = report["truth"]
  run.progress.note(
    f"truth of {check['tokens']} tokens: its halves correlate with {check['correlation']:.3f}"
  )
  with run.progress.bar("advantages", total=len(methods) * len(args.shares)) as advance:
    drawn = values.judge_methods(bench, methods, args.shares, advance)
  judged = [one.judged for one in drawn]
  run.progress.note(f"advantages of {len(judged)} methods and sizes are judged")
  aligned: dict[str, list[alignment.Alignment]] = {}
  if args.budgets:
    aligned, report["true_gradient"] = align_methods(
      args, run, params, critic_params, methods, true_method
    )
  report |= {"advantages": tables.as_json(judged), "gradients": tables.as_json(aligned)}
  (args.out / "credit.json").write_text(json.dumps(report, indent=2) + "\n")
  page = tables.page(report, judged, aligned)
  (args.out / "credit.md").write_text(page)
  draw(args, run, bench, drawn, aligned)
  return page


def draw(args, run: Run, bench: values.Bench, drawn: list[values.Drawn], aligned) -> None:
  """The pictures, or a word why there are none."""
  if not pictures.available():
    run.progress.note("no pictures: matplotlib is not installed (the extra 'benchmarks' has it)")
    return
  texts = [run.task.tokenizer.batch_decode([[i] for i in t.tokens]) for t in bench.trajectories]
  share = args.shares[len(args.shares) // 2]
  shown = [one for one in drawn if one.judged.share == share]
  pictures.draw_trajectory(args.out, bench.trajectories, texts, shown)
  if aligned:
    pictures.draw_cosines(args.out, aligned)


def make_bench(args, run: Run, params) -> tuple[values.Bench, dict[str, Any]]:
  """Samples the trajectories and their truth."""
  records = next(
    source.make_iterator(run.task.split(args.split), batch_size=args.prompts, seed=args.seed)
  )
  with run.progress.bar("truth", total=args.prompts) as advance:
    trajectories = sample_trajectories(
      run,
      params,
      records,
      samples=args.samples,
      rollouts=args.rollouts,
      prompts=args.prompts_at_once,
      seed=args.seed,
      advance=advance,
    )
  threshold = run.config.probability_threshold
  report = {
    "workdir": str(args.workdir),
    "policy": args.policy,
    "split": args.split,
    "prompts": args.prompts,
    "trajectories": len(trajectories),
    "rollouts": args.rollouts,
    "threshold": threshold,
    "rank_tokens": args.rank_tokens,
    "decisions": int(sum(np.sum(t.logprobs < np.log(threshold)) for t in trajectories)),
    "mean_reward": float(np.mean([t.values[0] for t in trajectories])),
    "truth": self_check(trajectories),
  }
  bench = values.Bench(
    run=run,
    params=params,
    trajectories=trajectories,
    answers=[records[t.prompt]["answer"] for t in trajectories],
    draws=args.draws,
    children=args.children,
    threshold=threshold,
    rank_tokens=args.rank_tokens,
    seed=args.seed + 1,
  )
  return bench, report


def align_methods(args, run: Run, params, critic_params, methods, true_method):
  """({method: its alignment at each budget}, how far the true gradient can be trusted)."""
  seeded = lambda method, seed: dataclasses.replace(
    method, config=dataclasses.replace(method.config, seed=seed)
  )
  sizes = {"prompts": args.sampled_at_once, "critic_params": critic_params}
  tokens = args.budgets[0] * 4
  batches = -(-args.true_tokens // tokens // args.true_parts) * args.true_parts
  with run.progress.bar("true gradient", total=batches) as advance:
    own = [seeded(true_method, args.seed + 2)]
    found = gradients.measure(
      run, params, own, args.split, tokens=tokens, batches=batches, advance=advance, **sizes
    )[true_method.name]
  truth = found.pooled(batches // args.true_parts)
  halves, trusted = alignment.trust(truth)
  run.progress.note(
    f"true gradient from {compact(found.tokens.sum())} tokens: its halves have cosine {halves:.3f}"
  )
  with run.progress.bar("gradients", total=args.batches * len(methods)) as advance:
    measured = gradients.measure(
      run,
      params,
      [seeded(method, args.seed + 3) for method in methods],
      args.split,
      tokens=args.budgets[0],
      batches=args.batches,
      advance=advance,
      **sizes,
    )
  aligned = {
    name: [alignment.align(found, truth, budget // args.budgets[0]) for budget in args.budgets]
    for name, found in measured.items()
  }
  return aligned, {"tokens": int(found.tokens.sum()), "halves": halves, "own": trusted}


if __name__ == "__main__":
  sys.exit(main())
