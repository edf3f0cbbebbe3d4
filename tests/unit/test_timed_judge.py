"""Judges that hang, raise, crash and chatter: each costs its answer, and nothing else."""

from __future__ import annotations

import threading
import time

import pytest

from stableopd.benchmarking.timed import JudgeFailedError, TimedJudge
from stableopd.errors import ConfigError

CODE = """
import ctypes, os, sys, time

def judge(completion, answer):
    print("chatter on standard output", flush=True)
    if completion == "hang":
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    if completion == "hang in C":
        ctypes.CDLL(None).sleep(60)
    if completion == "raise":
        raise RuntimeError("strange output")
    if completion == "crash":
        os._exit(11)
    if completion == "exit":
        sys.exit(0)
    if completion == "maybe":
        return "maybe"
    if completion == "numpy":
        import numpy
        return numpy.bool_(True)
    return completion == answer

def extract(completion):
    return completion[:1] or None

judge.extract = extract
"""


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    (folder / "strange_judge.py").write_text(CODE)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    yield "strange_judge:judge"
    patch.undo()


def test_whatever_a_judge_does_costs_its_answer_alone(name):
    asked = ["2", "hang", "2", "raise", "crash", "exit", "maybe", "hang in C", "numpy", "3", "2"]
    with TimedJudge(name, timeout_s=1.0) as judge:
        found = [judge.judge(completion, "2") for completion in asked]
    assert [one.right for one in found] == [completion in ("2", "numpy") for completion in asked]
    assert [one.failure for one in found] == [
        None, "timeout", None, "error", "error", "error", "error", "timeout", None, None, None,
    ]  # fmt: skip
    assert "strange output" in found[3].message
    assert "1 s" in found[1].message
    assert found[0].vote == "2"


def test_several_workers_answer_in_order_and_one_that_hangs_holds_up_no_other(name):
    asked = [("hang", "2"), *[(str(n), "2") for n in range(8)]]
    began = time.perf_counter()
    with TimedJudge(name, timeout_s=1.5, num_workers=2) as judge:
        found = judge.judge_all(asked)
    assert [one.right for one in found] == [False] + [n == 2 for n in range(8)]
    assert found[0].failure == "timeout"
    assert time.perf_counter() - began < 20


def test_it_works_in_a_thread_where_signals_would_not(name):
    found = []
    with TimedJudge(name, timeout_s=0.5) as judge:
        thread = threading.Thread(target=lambda: found.append(judge.judge("hang", "2")))
        thread.start()
        thread.join(20)
    assert [one.failure for one in found] == ["timeout"]


def test_called_like_any_judge_it_raises_where_there_is_no_verdict(name):
    with TimedJudge(name, timeout_s=0.5) as judge:
        assert judge("2", "2") is True
        assert judge("3", "2") is False
        with pytest.raises(JudgeFailedError, match="strange output"):
            judge("raise", "2")
        with pytest.raises(JudgeFailedError) as caught:
            judge("hang", "2")
    assert caught.value.failure == "timeout"


def test_text_of_any_kind_reaches_the_judge_as_it_is(name):
    texts = ["a\nb", "\u2028", "\x00", "ü 漢 🙂", "\ud800", "x" * 1_000_000, ""]
    with TimedJudge(name) as judge:
        assert [judge.judge(text, text).right for text in texts] == [True] * len(texts)


def test_exact_needs_no_process_and_votes_by_its_text():
    judge = TimedJudge("exact")
    assert judge.judge(" 2 ", "2").right
    assert judge.judge(" 3 ", "2").vote == "3"
    assert judge.judge("  ", "2").vote is None
    assert judge._workers == []


def test_math_is_judged_and_voted_on_by_its_last_expression():
    pytest.importorskip("math_verify")
    with TimedJudge("math", timeout_s=60) as judge:
        half = judge.judge("so it is $\\boxed{\\frac{1}{2}}$", "0.5")
        wrong = [judge.judge(text, "0.5") for text in ("$\\boxed{3}$", "The answer is 3.", "no idea")]
    assert half.right
    assert not any(one.right for one in wrong)
    assert wrong[0].vote == wrong[1].vote
    assert wrong[2].vote is None


def test_a_judge_that_cannot_be_had_is_refused_when_first_asked(tmp_path, monkeypatch):
    for unknown in ("no_such_module_at_all:judge", "os:no_such_function", "os:path", "fuzzy"):
        with TimedJudge(unknown, setting="--judge") as judge, pytest.raises(ConfigError, match="--judge"):
            judge.judge("a", "b")
    (tmp_path / "broken_judge.py").write_text("raise RuntimeError('at import')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with TimedJudge("broken_judge:judge") as judge, pytest.raises(ConfigError, match="at import"):
        judge.judge("a", "b")


def test_nothing_is_left_running_when_it_is_closed(name):
    judge = TimedJudge(name, num_workers=2)
    judge.judge_all([("1", "1")] * 4)
    processes = [worker._process for worker in judge._workers if worker._process]
    assert processes
    judge.close()
    assert all(process.poll() is not None for process in processes)
