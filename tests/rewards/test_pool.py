import contextlib
import os
import signal
import time
from concurrent import futures

import numpy as np
import pytest

from spo_jax import rewards
from spo_jax.errors import UserError
from spo_jax.rewards import keeper, pool

HOSTILE = "tests.rewards.hostile:misbehave"
TIMEOUT_S = 0.5
WORKERS = 2
# What a batch may take beyond its deadlines: forks, messages, other users of a shared machine.
SLACK_S = 3.0

# What a text does to its grader, and what the pool says about it.
FAILURES = {
  "loop": keeper.TIMED_OUT,
  "power": keeper.TIMED_OUT,
  "deaf": keeper.TIMED_OUT,
  "exit": keeper.DIED,
  "sys.exit": keeper.DIED,
  "crash": keeper.DIED,
  "patricide": pool.KEEPER_DIED,
  "recurse": "RecursionError",
  "memory": "MemoryError",
  "eat": ("MemoryError", keeper.TIMED_OUT),  # whichever comes first
  "nan": "reward nan",
  "none": "TypeError",
  "raise": "RuntimeError",
}


@pytest.fixture(scope="module")
def hostile_pool():
  made = pool.GraderPool(HOSTILE, workers=WORKERS, timeout_s=TIMEOUT_S, memory_mb=512)
  made.check()
  yield made
  made.close()


def test_hostile_responses_cost_their_own_rewards_only(hostile_pool):
  responses = []
  for kind in FAILURES:
    responses += ["good", kind, "bad"]
  start = time.perf_counter()
  outcomes = hostile_pool.grade(responses, ["answer"] * len(responses))
  elapsed = time.perf_counter() - start
  assert [outcome.reward for outcome in outcomes] == [1.0, 0.0, 0.0] * len(FAILURES)
  for kind, expected, *others in zip(
    FAILURES, FAILURES.values(), outcomes[1::3], outcomes[::3], outcomes[2::3], strict=True
  ):
    assert others[0].failure.startswith(expected), (kind, others[0])
    assert others[1].failure == others[2].failure == ""
  # "patricide" also waits for a new keeper, which imports what the first one imported.
  stalls = sum(keeper.TIMED_OUT in failure for failure in FAILURES.values())
  assert elapsed < (-(-stalls // WORKERS) + 1) * TIMEOUT_S + SLACK_S


def test_a_fork_of_a_grader_answers_for_nobody():
  made = pool.GraderPool(HOSTILE, workers=1, timeout_s=TIMEOUT_S, memory_mb=512)
  with contextlib.closing(made):
    responses = ["fork", "bad", "good", "bad", "bad", "good"]
    outcomes = made.grade(responses, ["answer"] * len(responses))
  assert [outcome.reward for outcome in outcomes] == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]


def test_failures_are_counted_and_logged(hostile_pool):
  graded, failed = rewards.grade_all(
    ["good", "raise", "bad", "exit", "nan"], ["answer"] * 5, hostile_pool
  )
  assert graded.dtype == np.float32
  assert graded.tolist() == [1, 0, 0, 0, 0] and failed.sum() == 3


def test_each_response_has_its_own_deadline(hostile_pool):
  # Five times 0.3 s by two workers is longer than one deadline.
  outcomes = hostile_pool.grade(["sleep"] * 5, ["answer"] * 5)
  assert [outcome.failure for outcome in outcomes] == [""] * 5


def test_order_is_kept_when_workers_finish_out_of_order(hostile_pool):
  responses = ["sleep", "good 1", "bad", "good 2", "sleep", "good 3"]
  outcomes = hostile_pool.grade(responses, ["answer"] * 6)
  assert [outcome.reward for outcome in outcomes] == [0, 1, 0, 1, 0, 1]


def test_texts_of_any_size_and_content(hostile_pool):
  responses = ["good" + "x" * 10_000_000, "good\ud800\x00\n", "", "print", "good"]
  outcomes = hostile_pool.grade(responses, ["answer"] * 5)
  assert [outcome.reward for outcome in outcomes] == [1, 1, 0, 0, 1]
  assert all(outcome.failure == "" for outcome in outcomes)


def test_processes_are_reused_and_never_import_jax(hostile_pool):
  first = {o.reward for o in hostile_pool.grade(["pid", "sleep"] * 4, [""] * 8)} - {0.0}
  second = {o.reward for o in hostile_pool.grade(["pid", "sleep"] * 4, [""] * 8)} - {0.0}
  assert 1 <= len(first | second) <= WORKERS
  assert os.getpid() not in first
  assert [o.reward for o in hostile_pool.grade(["jax"] * 4, [""] * 4)] == [0.0] * 4


def test_empty_batch(hostile_pool):
  graded, failed = rewards.grade_all([], [], hostile_pool)
  assert graded.shape == (0,) and not failed.any()


def test_a_stopped_keeper_does_not_stall_the_run(hostile_pool, monkeypatch):
  hostile_pool.grade(["good", "good"], ["answer"] * 2)
  monkeypatch.setattr(hostile_pool, "_patience_s", 1.0)
  process = hostile_pool._keepers[0]._process
  os.kill(process.pid, signal.SIGSTOP)
  monkeypatch.setattr(pool, "END_S", 0.1)
  start = time.perf_counter()
  outcomes = hostile_pool.grade(["good"] * 4, ["answer"] * 4)
  assert time.perf_counter() - start < 1.0 + SLACK_S
  assert [o.failure for o in outcomes].count("") == 3
  assert hostile_pool.grade(["good"], ["answer"])[0].reward == 1.0


def test_closing_ends_all_processes_and_using_starts_them_again(capfd):
  made = pool.GraderPool(HOSTILE, workers=1, timeout_s=60.0, memory_mb=512)
  child = int(made.grade(["pid"], [""])[0].reward)
  process = made._keepers[0]._process
  made.grade(["print"], [""])
  made.close()
  assert capfd.readouterr() == ("", "")
  assert process.returncode is not None
  _assert_ends(child)
  assert made.grade(["good"], ["answer"])[0].reward == 1.0
  made.close()


def test_a_process_that_is_told_to_end_while_it_ends_is_silent(capfd):
  late = "tests.rewards.terminated_late:grade"
  made = pool.GraderPool(late, workers=1, timeout_s=60.0, memory_mb=512)
  assert made.grade(["1"], ["1"])[0].reward == 1
  made.close()
  assert capfd.readouterr() == ("", "")


def test_an_interrupt_in_mid_batch_leaves_no_stale_replies_or_processes(monkeypatch):
  made = pool.GraderPool(HOSTILE, workers=1, timeout_s=60.0, memory_mb=512)
  child = int(made.grade(["pid"], [""])[0].reward)

  def interrupt(*_):
    time.sleep(0.3)  # The child is in its loop.
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(pool.connection, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
      made.grade(["loop"], ["answer"])
  _assert_ends(child)
  assert made.grade(["good"], ["answer"])[0].reward == 1.0
  made.close()


def test_two_threads_have_each_their_own_outcomes():
  made = pool.GraderPool(HOSTILE, workers=2, timeout_s=60.0, memory_mb=512)
  with futures.ThreadPoolExecutor(2) as threads:
    batches = [["good"] * 20, ["wrong"] * 20]
    both = threads.map(lambda batch: made.grade(batch, ["answer"] * 20), batches)
    rewards_of = [[outcome.reward for outcome in outcomes] for outcomes in both]
  made.close()
  assert rewards_of == [[1.0] * 20, [0.0] * 20]


def test_a_grader_that_cannot_be_loaded_is_named():
  with pytest.raises(UserError, match="no.such.module:grade' cannot be loaded: ModuleNotFound"):
    rewards.open_grader("no.such.module:grade")
  with pytest.raises(UserError, match="cannot be loaded: AttributeError"):
    rewards.open_grader("tests.rewards.hostile:nothing")


def test_bounded_graders_run_in_process():
  assert callable(rewards.open_grader("numbers"))
  made = rewards.open_grader(HOSTILE, workers=1)
  assert isinstance(made, pool.GraderPool)
  rewards.close_grader(made)


def _assert_ends(pid: int) -> None:
  for _ in range(100):
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      return
    time.sleep(0.05)
  raise AssertionError(f"process {pid} is still there")
