"""Graders for tests of the pool and of the loop; they import no JAX."""

import os
import signal
import sys
import time


def misbehave(response: str, answer: str) -> float:
  """1.0 for a good answer, a disaster for some others."""
  match response:
    case "loop":
      while True:
        pass
    case "power":
      return float(10 ** (10**10))  # One operation: no signal handler of Python's gets a turn.
    case "recurse":
      return misbehave(response, answer)
    case "exit":
      os._exit(0)
    case "sys.exit":
      sys.exit(3)
    case "memory":
      return float(len(bytearray(2**30)))
    case "eat":
      eaten = []
      while True:
        eaten.append(bytearray(2**24))
    case "nan":
      return float("nan")
    case "none":
      return None
    case "raise":
      raise RuntimeError("x" * 10**6)
    case "crash":
      os.kill(os.getpid(), signal.SIGSEGV)
    case "deaf":
      signal.alarm(0)
      for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
      time.sleep(1000)
    case "patricide":
      os.kill(os.getppid(), signal.SIGKILL)
      time.sleep(1000)
    case "fork":
      os.fork()
      return 1.0
    case "print":
      print("x" * 10**6)
      print("y" * 10**6, file=sys.stderr)
    case "jax":
      return float("jax" in sys.modules)
    case "pid":
      return float(os.getpid())
    case "sleep":
      time.sleep(0.3)
  return float(response.startswith("good") and answer == "answer")


def by_length(response: str, answer: str) -> float:
  """Hangs, raises, says 0 or says 1, as the length of a response modulo 4 is 0, 1, 2 or 3."""
  del answer
  kind = len(response) % 4
  if kind == 0:
    time.sleep(1000)
  if kind == 1:
    raise RuntimeError("an odd response")
  return float(kind == 3)


def fail(response: str, answer: str) -> float:
  """Raises."""
  raise RuntimeError(f"{response} or {answer}?")
