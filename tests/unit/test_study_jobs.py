from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from stableopd.study.jobs import Job, run_jobs


def job(tmp_path: Path, name: str, code: str, *, after: tuple[str, ...] = (), settings: str = "", **more) -> Job:
    command = (sys.executable, "-c", textwrap.dedent(code), "{resume}")
    return Job(name=name, command=command, stem=tmp_path / name, after=after, settings=settings, **more)


def statuses(ended) -> dict[str, str]:
    return {name: end.status for name, end in ended.items()}


def test_a_job_starts_when_what_it_needs_is_done_and_finished_ones_are_not_repeated(tmp_path):
    first = job(tmp_path, "first", f"open({str(tmp_path / 'a')!r}, 'a').write('x')")
    second = job(tmp_path, "second", f"assert open({str(tmp_path / 'a')!r}).read() == 'x'", after=("first",))
    assert statuses(run_jobs([second, first], parallel=2)) == {"first": "done", "second": "done"}
    again = run_jobs([second, first], parallel=2)
    assert statuses(again) == {"first": "done", "second": "done"}
    assert not any(end.fresh for end in again.values())
    assert (tmp_path / "a").read_text() == "x"


def test_a_failure_skips_what_needs_it_and_nothing_else(tmp_path):
    jobs = [
        job(tmp_path, "bad", "print('the reason'); raise SystemExit(2)"),
        job(tmp_path, "child", "pass", after=("bad",)),
        job(tmp_path, "grandchild", "pass", after=("child",)),
        job(tmp_path, "good", "pass"),
    ]
    ended = run_jobs(jobs, parallel=1)
    assert statuses(ended) == {"bad": "failed", "child": "skipped", "grandchild": "skipped", "good": "done"}
    assert "status 2" in ended["bad"].why
    assert "the reason" in ended["bad"].why
    assert ended["child"].why == "needs bad"
    mended = job(tmp_path, "bad", "pass")
    assert set(statuses(run_jobs([mended, *jobs[1:]], parallel=1)).values()) == {"done"}


def test_a_run_that_its_controller_stopped_is_done(tmp_path):
    ended = run_jobs([job(tmp_path, "stopped", "raise SystemExit(3)")], parallel=1)
    assert ended["stopped"].status == "done"


def test_a_command_that_cannot_be_started_fails_alone(tmp_path):
    absent = Job(name="absent", command=("/no/such/program",), stem=tmp_path / "absent")
    ended = run_jobs([absent, job(tmp_path, "good", "pass")], parallel=1)
    assert statuses(ended) == {"absent": "failed", "good": "done"}
    assert "/no/such/program" in ended["absent"].why


def test_never_more_than_so_many_run_at_a_time(tmp_path):
    code = f"""
        import os, pathlib, time
        folder = pathlib.Path({str(tmp_path)!r}, "alive"); folder.mkdir(exist_ok=True)
        mine = folder / str(os.getpid()); mine.touch()
        alive = len(list(folder.iterdir()))
        time.sleep(0.3); mine.unlink()
        assert alive <= 2, alive
    """
    ended = run_jobs([job(tmp_path, f"job{n}", code) for n in range(6)], parallel=2)
    assert set(statuses(ended).values()) == {"done"}


def test_a_job_made_with_other_settings_is_not_taken_for_this_one(tmp_path):
    run_jobs([job(tmp_path, "teacher", "pass", settings="seed 1")], parallel=1)
    ended = run_jobs([job(tmp_path, "teacher", "pass", settings="seed 2")], parallel=1)
    assert ended["teacher"].status == "failed"
    assert "other settings" in ended["teacher"].why


def test_resume_is_said_only_to_what_was_begun(tmp_path):
    code = f"import sys; open({str(tmp_path / 'said')!r}, 'a').write(repr(sys.argv[1:]))"
    begun = tmp_path / "run" / "config.yaml"
    for _ in range(2):
        run_jobs([job(tmp_path, "run", code, begun=begun)], parallel=1)
        begun.parent.mkdir(exist_ok=True)
        begun.touch()
        (tmp_path / "run.job.json").unlink()
    assert (tmp_path / "said").read_text() == "[]['--resume']"


def test_what_was_begun_with_other_settings_is_not_gone_on_with(tmp_path):
    begun = tmp_path / "run"
    code = f"import pathlib; pathlib.Path({str(begun)!r}).mkdir(exist_ok=True); raise SystemExit(1)"
    assert run_jobs([job(tmp_path, "run", code, begun=begun, settings="a")], parallel=1)["run"].status == "failed"
    ended = run_jobs([job(tmp_path, "run", "pass", begun=begun, settings="b")], parallel=1)
    assert "begun with other settings" in ended["run"].why
    begun.rmdir()
    ended = run_jobs([job(tmp_path, "run", "pass", begun=begun, settings="b")], parallel=1)
    assert ended["run"].status == "done"


def test_a_job_that_may_be_made_anew_is_where_its_settings_have_changed(tmp_path):
    run_jobs([job(tmp_path, "answers", "pass", settings="a")], parallel=1)
    again = job(tmp_path, "answers", "pass", settings="b", again=True)
    assert again.is_to_be_made
    assert run_jobs([again], parallel=1)["answers"].fresh
    assert not job(tmp_path, "answers", "pass", settings="b", again=True).is_to_be_made


def test_a_job_that_ends_well_before_its_end_has_failed(tmp_path):
    last = tmp_path / "step-000010"
    ended = run_jobs([job(tmp_path, "run", "raise SystemExit(0)", leaves=last)], parallel=1)
    assert (ended["run"].status, "ended with status 0, but" in ended["run"].why) == ("failed", True)
    ended = run_jobs([job(tmp_path, "run", f"open({str(last)!r}, 'w')", leaves=last)], parallel=1)
    assert ended["run"].status == "done"
    last.unlink()
    assert not run_jobs([job(tmp_path, "run", "pass", leaves=last)], parallel=1)["run"].fresh  # it may be deleted


def test_the_log_of_what_goes_on_is_added_to_and_that_of_a_new_start_is_not(tmp_path):
    begun = tmp_path / "run" / "config.yaml"
    run_jobs([job(tmp_path, "run", "print('first'); raise SystemExit(1)", begun=begun)], parallel=1)
    run_jobs([job(tmp_path, "run", "print('second'); raise SystemExit(1)", begun=begun)], parallel=1)
    assert (tmp_path / "run.log").read_text().split() == ["second"]
    begun.parent.mkdir()
    begun.touch()
    run_jobs([job(tmp_path, "run", "print('third')", begun=begun)], parallel=1)
    assert (tmp_path / "run.log").read_text().split() == ["second", "third"]


def test_an_interrupt_leaves_no_process_behind(tmp_path):
    script = f"""
        import pathlib, sys
        from stableopd.study.jobs import Job, run_jobs
        command = (sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
        run_jobs([Job(name="long", command=command, stem=pathlib.Path({str(tmp_path)!r}) / "long")], parallel=1)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL)
    log = tmp_path / "long.log"
    deadline = time.monotonic() + 20
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(log.read_text())
    process.send_signal(2)
    assert process.wait(timeout=20) != 0
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        pass
    else:
        raise AssertionError("the child is still alive")
    assert "returncode" not in json.loads((tmp_path / "long.job.json").read_text())
