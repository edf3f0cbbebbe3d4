"""Judges that hang, raise, crash and chatter: each costs its answer, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stableopd.benchmarking.timed import JudgeFailedError, TimedJudge
from stableopd.errors import ConfigError
from stableopd.judges import voter_of

CODE = """
import ctypes, os, subprocess, sys, threading, time

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
    if completion == "read":
        sys.stdin.readline()
        subprocess.run(["cat"])
    if completion.startswith("leave "):
        child = subprocess.Popen(["sleep", "600"])
        with open(completion.removeprefix("leave "), "w") as file:
            file.write(str(child.pid))
        child.wait()
    if completion == "raise":
        raise RuntimeError("strange output")
    if completion == "crash":
        os._exit(11)
    if completion == "exit":
        sys.exit(0)
    if completion.startswith("says "):
        return int(completion.removeprefix("says "))
    if completion == "maybe":
        return "maybe"
    if completion == "scribble":
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, b"junk\\n\\n[1]\\n{\\"right\\": true}\\njunk")
            except OSError:
                pass
        return False
    if completion == "die later":
        threading.Timer(0.2, os._exit, (3,)).start()
    if completion == "numpy":
        import numpy
        return numpy.bool_(True)
    return completion == answer

def extract(completion):
    if completion == "votes":
        raise ValueError("strange vote")
    if completion == "fall":
        os._exit(7)
    if completion == "pause":
        time.sleep(60)
    if completion == "quit":
        sys.exit(1)
    if completion == "set":
        return {"one", "two", "three", "four"}
    if completion == "list":
        return ["1", object]
    if completion == "number":
        return 3
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
    asked += ["scribble", "2", "says -1", "says 2", "says 1", "says 0"]
    with TimedJudge(name, timeout_s=1.0) as judge:
        found = [judge.judge(completion, "2") for completion in asked]
    assert [one.right for one in found] == [completion in ("2", "numpy", "says 1") for completion in asked]
    assert [one.failure for one in found] == [
        None, "timeout", None, "error", "error", "error", "error", "timeout", None, None, None,
        None, None, "error", "error", None, None,
    ]  # fmt: skip
    assert "strange output" in found[3].message
    assert "1 s" in found[1].message
    assert found[0].vote == "2"


def test_a_process_that_dies_between_two_questions_costs_no_answer(name):
    with TimedJudge(name, timeout_s=5.0) as judge:
        assert judge.judge("die later", "die later").right
        time.sleep(1.0)
        assert judge.judge("2", "2").right


def test_a_process_that_is_gone_is_closed_without_an_error(name):
    with TimedJudge(name, timeout_s=5.0) as judge:
        judge.start()
        (worker,) = judge._workers
        worker._process.kill()
        worker._process.wait()
        worker._process.stdin.write(b"what no one reads")
    assert worker._process is None


def test_a_vote_of_any_kind_is_text_or_none_and_never_costs_the_verdict(name):
    votes = []
    for _ in range(2):  # processes of their own, in which sets have orders of their own
        with TimedJudge(name, timeout_s=2.0) as judge:
            asked = ("votes", "set", "list", "number", "quit", "2", "pause", "fall", "2")
            found = [judge.judge(answer, answer) for answer in asked]
        assert all(one.right and one.failure is None for one in found)
        votes.append([one.vote for one in found])
    kinds = [None, "['four', 'one', 'three', 'two']", "['1', <class 'object'>]", "3"]
    assert votes[0] == [*kinds, None, "2", None, None, "2"]
    assert votes[1] == votes[0]


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


def test_a_judge_that_reads_standard_input_finds_it_empty(name):
    with TimedJudge(name, timeout_s=10.0) as judge:
        found = [judge.judge(completion, "2") for completion in ("read", "2", "read", "2")]
    assert [(one.right, one.failure) for one in found] == [(False, None), (True, None)] * 2


def test_what_a_judge_started_dies_with_it(name, tmp_path):
    with TimedJudge(name, timeout_s=2.0) as judge:
        assert judge.judge(f"leave {tmp_path / 'pid'}", "2").failure == "timeout"
        assert _is_gone(int((tmp_path / "pid").read_text()))


def test_a_judge_that_hangs_does_not_outlive_one_who_was_killed(name):
    """The worker is asked by hand, as by someone who has no time left to kill it."""
    command = [sys.executable, "-m", "stableopd.benchmarking.judge_worker", name, "judge"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert "ready" in json.loads(process.stdout.readline())
        process.stdin.write(b'{"completion": "hang", "answer": "2", "token": "t", "last_resort_s": 0.5}\n')
        process.stdin.flush()
        try:
            assert process.wait(20) == -signal.SIGALRM
        finally:
            process.kill()


def _is_gone(pid: int) -> bool:
    """Ended within seconds; one whose parent died may be left as a zombie."""
    path = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if path.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


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


@pytest.mark.parametrize(
    "alike",
    [
        ("$\\boxed{3}$", "The answer is 3.0.", "$x = 3$", "\\boxed{\\frac{6}{2}}"),
        ("\\boxed{\\frac{1}{2}}", "\\boxed{0.5}"),
        ("\\boxed{\\sqrt{8}}", "\\boxed{2\\sqrt{2}}"),
        ("\\boxed{10^{5000}}",),
        ("\\boxed{10^{5001}}",),
        ("\\boxed{100000!}",),
        ("\\boxed{x + 1}",),
        ("\\boxed{\\{1, 2\\}}", "\\boxed{2, 1}"),
    ],
)
def test_equal_values_vote_together_and_others_apart(alike):
    pytest.importorskip("math_verify")
    vote = voter_of("math")
    assert len({vote(text) for text in alike}) == 1
    assert vote(alike[0]) not in (None, vote("\\boxed{4}"), vote("\\boxed{10^{4999}}"), vote("\\boxed{x + 2}"))


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
