"""The grader of MATH on answers of which some are hostile: `python -m benchmarks.grading`.

Good and wrong answers are made up; hostile ones make sympy or the parser hang, or are huge. Prints
a line of JSON and a table by kind of answer.
"""

import argparse
import collections
import fractions
import json
import os
import platform
import random
import time

from spo_jax import rewards
from spo_jax.rewards.pool import GraderPool
from spo_jax.rewards.registry import GRADERS

# Responses that no reference answer equals, by what is bad about them.
HOSTILE = {
  "tower": r"\boxed{10^{10^{10}}}",
  "factorial": r"\boxed{100000000!}",
  "expansion": r"\boxed{(x+1)^{9999}(x-1)^{9999}}",
  "nested brackets": r"\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
  "nested roots": r"\boxed{" + r"\sqrt{" * 150 + "x" + "}" * 151,
  "10 MB of boxes": r"\boxed{" * 1_400_000,
  "10 MB of braces": "{" * 10_000_000,
  "10 MB of digits": "1" * 10_000_000,
  "10 MB of answers": "the answer is " * 700_000,
  "10 MB of headings": "# Answer\n" * 1_100_000,
}


def ordinary(rng: random.Random) -> tuple[str, str, float]:
  """A response, its reference answer and the reward that it deserves."""
  a, b, c = rng.randint(2, 60), rng.randint(61, 99), rng.randint(2, 9)
  ratio = fractions.Fraction(a, b)
  given, reference = rng.choice(
    [
      (rf"\frac{{{a * c}}}{{{b * c}}}", f"{ratio.numerator}/{ratio.denominator}"),
      (rf"\sqrt{{{a * c * c}}}", rf"{c}\sqrt{{{a}}}"),
      (f"({a}, {b})", f"({a},{b})"),
      (f"x^2-{a * a}", f"(x-{a})(x+{a})"),
      (rf"{a}\text{{ cm}}", f"{a}"),
      (f"{b}, {a}", f"{a}, {b}"),
    ]
  )
  if right := rng.random() < 0.5:
    return rf"So it is $\boxed{{{given}}}$.", reference, float(right)
  return rf"So it is $\boxed{{{given} + 1}}$.", reference, float(right)


def main() -> None:
  """Grades once and prints."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--answers", type=int, default=2000)
  parser.add_argument("--hostile", type=int, default=50, help="how many of them are hostile")
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  parser.add_argument("--timeout", type=float, default=rewards.DEFAULT_TIMEOUT_S, help="seconds")
  args = parser.parse_args()

  rng = random.Random(0)
  kinds = list(HOSTILE)
  rows = [("ordinary", *ordinary(rng)) for _ in range(args.answers - args.hostile)]
  for i in range(args.hostile):
    kind = kinds[i % len(kinds)]
    rows.append((kind, HOSTILE[kind], "1/2", 0.0))
  rng.shuffle(rows)
  names, responses, references, deserved = zip(*rows, strict=True)

  pool = GraderPool(
    GRADERS["math"].path,
    workers=args.workers,
    timeout_s=args.timeout,
    memory_mb=rewards.DEFAULT_MEMORY_MB,
  )
  pool.check()
  start = time.perf_counter()
  outcomes = pool.grade(responses, references)
  seconds = time.perf_counter() - start
  start = time.perf_counter()
  harmless = [i for i, name in enumerate(names) if name == "ordinary"]
  pool.grade([responses[i] for i in harmless], [references[i] for i in harmless])
  seconds_harmless = time.perf_counter() - start
  pool.close()

  failures = collections.Counter(outcome.failure for outcome in outcomes if outcome.failure)
  # Each hostile answer costs a worker a deadline at most.
  stalls = -(-args.hostile // args.workers) + 1
  result = {
    "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores",
    "answers": len(rows),
    "hostile": args.hostile,
    "workers": args.workers,
    "deadline_s": args.timeout,
    "seconds": round(seconds, 1),
    "seconds_without_hostile": round(seconds_harmless, 1),
    "bound_s": round(seconds_harmless + stalls * args.timeout, 1),
    "wrong_rewards": sum(o.reward != want for o, want in zip(outcomes, deserved, strict=True)),
    "failures": dict(failures),
  }
  print(json.dumps(result))
  print(f"\n{'answers':<20}{'number':>8}{'reward 1':>10}{'failed':>8}")
  for kind in ["ordinary", *kinds]:
    chosen = [outcome for name, outcome in zip(names, outcomes, strict=True) if name == kind]
    ones = sum(outcome.reward == 1.0 for outcome in chosen)
    failed = sum(bool(outcome.failure) for outcome in chosen)
    print(f"{kind:<20}{len(chosen):>8}{ones:>10}{failed:>8}")


if __name__ == "__main__":
  main()
