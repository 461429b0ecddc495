"""Writes the report of a run, also while it is under way: `python -m spo_jax.report WORKDIR`."""

import argparse
import sys
from collections.abc import Sequence

from spo_jax.errors import UserError
from spo_jax.infra.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
  """Writes the report and prints where it is; returns the exit status."""
  parser = argparse.ArgumentParser(prog="python -m spo_jax.report", description=__doc__)
  parser.add_argument("workdir", help="folder of the run")
  try:
    print(write_report(parser.parse_args(argv).workdir))
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
