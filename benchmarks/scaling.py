"""Cost of the sampler against size, beside the machine's roofline.

  python -m benchmarks.scaling --plot scaling.png --json scaling.json
  python -m benchmarks.scaling --axes batch --batch 16 256 4096 --model large --dtype bfloat16
  python -m benchmarks.scaling --axes --account context=4096

Three axes: `batch`, continuations of a prompt each; `context`, tokens of prompts that several
continuations share; `branches`, children of a node in trees of three levels with equally many
leaves in all. Random weights, one device, no continuation ends early. Tokens a second are of all
that follows the prefill; a step is the mean of all decode steps; compiling is told apart.

The roofline of a step is the longer of FLOPs at the measured rate of a large product, and bytes at
that of a large copy: weights once, visible keys and values of a prefix once a group and of suffixes
once a continuation, logits written and read. What stays in a CPU's caches is read faster than that.
`--account` takes one point's step apart.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks import scaling_plot
from benchmarks.peers import Model, random_model
from benchmarks.scaling_account import account
from benchmarks.scaling_points import (
  AXES,
  Point,
  check_fits,
  make_point,
  measure_point,
)
from benchmarks.timing import command_parser, machine, machine_rates, run
from spo_jax.errors import UserError
from spo_jax.models.decoder import count_params

# Layers, width and vocabulary. The last has the shape of a Qwen2 of 1.5 billion parameters.
MODELS = {
  "tiny": (2, 128, 2048),
  "small": (4, 256, 8192),
  "base": (12, 768, 32768),
  "large": (28, 1536, 151936),
}
DTYPES = ("float32", "bfloat16")
ACCOUNT = "batch=256"
POSITIVE = ("repeats", "prompt", "new", "context_prompts", "context_new", "samples", "segment")
POSITIVE += ("leaves", *AXES)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = command_parser("scaling", __doc__)
  parser.add_argument("--model", default="tiny", help=f"{', '.join(MODELS)} or LAYERSxWIDTHxVOCAB")
  parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of activations")
  parser.add_argument("--axes", nargs="*", choices=AXES, default=list(AXES))
  add = functools.partial(parser.add_argument, type=int)
  add("--batch", nargs="+", default=[16, 64, 256, 1024], help="continuations")
  add("--context", nargs="+", default=[256, 1024, 4096, 8192], help="tokens of a shared prompt")
  add("--branches", nargs="+", default=[2, 4, 8], help="children of a node")
  add("--prompt", default=64, help="tokens of a prompt, on the axes batch and branches")
  add("--new", default=128, help="tokens of a continuation, on the axis batch")
  add("--context-prompts", default=4, help="prompts on the axis context")
  add("--samples", default=16, help="continuations of each of them")
  add("--context-new", default=64, help="tokens of a continuation there")
  add("--segment", default=32, help="tokens of a tree's segment")
  add("--leaves", default=512, help="of all trees together")
  add("--repeats", default=3, help="timed calls of a point")
  parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
  parser.add_argument("--plot", type=pathlib.Path, help="PNG file for the picture")
  parser.add_argument(
    "--account", nargs="?", const=ACCOUNT, metavar="AXIS=SIZE", help=f"of a step, by {ACCOUNT}"
  )
  return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
  """Checks what argparse cannot.

  Raises:
    UserError: naming the flag.
  """
  for name in POSITIVE:
    value = vars(args)[name]
    for size in value if isinstance(value, list) else [value]:
      if size < 1:
        raise UserError(f"--{name.replace('_', '-')} {size} must be at least 1")
  if not args.axes and args.account is None:
    raise UserError("--axes names none, and there is no --account: nothing would be measured")
  if args.plot and not args.axes:
    raise UserError("--plot has nothing to draw without --axes")
  for name, ending in (("json", ".json"), ("plot", ".png")):
    path = vars(args)[name]
    if path and path.suffix != ending:
      raise UserError(f"--{name} {path} must end in {ending}")
    if path and not path.absolute().parent.is_dir():
      raise UserError(f"--{name} {path}: there is no folder {path.absolute().parent}")


def model_sizes(words: str) -> tuple[int, int, int]:
  """Layers, width and vocabulary.

  Raises:
    UserError: if the model is neither a name nor three numbers.
  """
  if words in MODELS:
    return MODELS[words]
  sizes = words.split("x")
  if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
    raise UserError(
      f"--model {words} must be one of {', '.join(MODELS)}, or LAYERSxWIDTHxVOCAB as in 4x256x8192"
    )
  return tuple(map(int, sizes))


def account_point(args: argparse.Namespace) -> Point | None:
  """The point whose step is taken apart.

  Raises:
    UserError: if the words name none.
  """
  if args.account is None:
    return None
  axis, _, size = args.account.partition("=")
  if axis not in AXES or not size.isdecimal() or int(size) < 1:
    raise UserError(
      f"--account {args.account} must be AXIS=SIZE as in {ACCOUNT}, an axis being one of "
      f"{', '.join(AXES)}"
    )
  return make_point(args, axis, int(size))


def device_bytes() -> int:
  """Memory of the first device; on a CPU the machine's."""
  stats = jax.devices()[0].memory_stats()
  return stats["bytes_limit"] if stats else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table."""
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def points_table(points: Sequence[Mapping[str, Any]]) -> str:
  """The points, to be read."""
  columns = ("axis", "size", "prompts", "continuations", "tokens/s (least to most)", "step, ms")
  columns += ("roofline, ms", "bound by", "efficiency", "prefill, s", "compile, s", "peak MiB")
  rows = []
  for point in points:
    rate = point["tokens_per_s"]
    rows.append(
      (
        point["axis"],
        *(str(point[name]) for name in ("size", "prompts", "continuations")),
        f"{rate['median']:.0f} ({rate['least']:.0f} to {rate['most']:.0f})",
        f"{1e3 * point['step_s']['median']:.3g}",
        f"{1e3 * point['roofline_s']:.3g}",
        point["bound"],
        f"{point['efficiency']:.2f}",
        f"{point['prefill_s']:.3g}",
        f"{point['compile_s']:.1f}",
        f"{point['peak_bytes'] / 2**20:.3g}",
      )
    )
  return markdown(columns, rows)


def account_table(parts: Mapping[str, Mapping[str, Any]]) -> str:
  """The account, to be read."""
  rows = []
  for name, part in parts.items():
    seconds = part["seconds"]
    cells = [name, f"{1e3 * seconds['median']:.3g}"]
    if "roofline_s" in part:
      cells[1] += f" ({1e3 * seconds['least']:.3g} to {1e3 * seconds['most']:.3g})"
      cells += [f"{part['flops'] / 1e6:.1f}", f"{part['bytes'] / 2**20:.2f}"]
      cells += [f"{1e3 * part['roofline_s']:.3g}", f"{part['efficiency']:.2f}"]
    else:
      cells += [""] * 4
    rows.append(cells)
  columns = ("part", "ms (least to most)", "least MFLOPs", "least MiB", "roofline, ms")
  return markdown((*columns, "efficiency"), rows)


def note(point: Point, found: Mapping[str, Any]) -> None:
  """A line on stderr when a point is done."""
  print(
    f"{point.axis} {point.size}: {found['tokens_per_s']['median']:.0f} tokens/s; compiled in "
    f"{found['compile_s']:.1f} s, first call {found['first_s']:.1f} s",
    file=sys.stderr,
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Measures and prints; returns the exit status."""
  return run("scaling", measure, parse_args(argv))


def measure(args: argparse.Namespace) -> None:
  """All points, then the account.

  Raises:
    UserError: if the command line asks for what cannot be.
  """
  check(args)
  points = [make_point(args, axis, size) for axis in args.axes for size in vars(args)[axis]]
  apart = account_point(args)
  model = make_model(args)
  for point in (*points, *([apart] if apart else [])):
    check_fits(model, point, device_bytes())
  rates = machine_rates(args.dtype)
  record = {
    "benchmark": "scaling",
    "machine": machine(),
    "jax": jax.__version__,
    **{name: str(v) if isinstance(v, pathlib.Path) else v for name, v in vars(args).items()},
    "layers": model.cfg.layers,
    "width": model.cfg.width,
    "vocab": model.cfg.vocab_size,
    "parameters": count_params(model.params),
    **rates,
    "points": [],
  }
  print(
    f"{record['machine']}, {rates['matmul_gflops']:.0f} GFLOP/s in {args.dtype}, "
    f"{rates['copy_gb_s']:.0f} GB/s; {record['layers']} layers of {record['width']}, vocabulary "
    f"{record['vocab']}\n"
  )
  for point in points:
    found = measure_point(model, point, args.repeats, rates)
    note(point, found)
    record["points"].append(found)
  if points:
    print(points_table(record["points"]))
  if apart:
    record["parts"] = account(model, apart, args.repeats, rates)
    print(f"\nA step of {args.account} at a full suffix:\n\n{account_table(record['parts'])}")
  if args.json:
    args.json.write_text(json.dumps(record, indent=1) + "\n")
  if args.plot:
    print(f"\n{scaling_plot.draw(record, args.plot)}")


def make_model(args: argparse.Namespace) -> Model:
  """The random model of the command line.

  Raises:
    UserError: if there is no such model.
  """
  model = random_model(*model_sizes(args.model))
  # Rows of products of all queries and keys would not fit a long prompt.
  cfg = dataclasses.replace(model.cfg, dtype=args.dtype, attention="flash")
  return model._replace(cfg=cfg)


if __name__ == "__main__":
  sys.exit(main())
