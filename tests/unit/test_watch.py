"""Watching run folders and files of rollouts: what is read, what is shown, and what a restart does to it."""

from __future__ import annotations

import io
import json
import os
import random
import re
import threading
import time
from pathlib import Path

import pytest
import yaml
from fake_runs import LOOP, write_collapsing_run, write_healthy_run, write_lines
from rich.console import Console

from stableopd.errors import RunFolderError
from stableopd.frames import frame
from stableopd.snapshot import Snapshot
from stableopd.watch import Lookout, follow, show_once
from stableopd.watched import Follower
from stableopd.watched_rollouts import RolloutSource


def settled(follower: Follower) -> Snapshot:
    """The snapshot once nothing more comes."""
    before, now = None, follower.poll()
    while before is not now or now.more:
        before, now = now, follower.poll()
    return now


def shown(snapshot: Snapshot, *, width: int = 80, **options) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(frame(snapshot, width=width, **options))
    return console.file.getvalue()


def append(path: Path, *records) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def once(path: Path) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=80)
    return show_once(path, console), console.file.getvalue()


ALERT = {
    "rule": "loops", "severity": "warning", "signal": "health/loop_token_fraction", "value": 0.3, "threshold": 0.05,
    "step": 3, "since": 2, "message": "30% of all tokens lie in loops. Likely cause: inflation.", "action": "none",
}  # fmt: skip


class TestRunFolder:
    def test_a_collapsed_run_is_told_with_its_curves_and_alerts(self, tmp_path):
        status, text = once(write_collapsing_run(tmp_path / "opd"))
        assert status == 1
        for words in ("run opd", "Collapsed at step", "step 100 of 100", "finished", "mean length", "truncated",
                      "in loops", "repetitive", "acc. held_out", "greedy", "critical clipped_ratio"):  # fmt: skip
            assert words in text
        assert re.search(r"truncated +▁.*[▆▇█] +\d", text)

    def test_a_healthy_run_is_0(self, tmp_path):
        status, text = once(write_healthy_run(tmp_path / "stable"))
        assert status == 0
        assert "Healthy" in text
        assert "no alerts" in text

    @pytest.mark.parametrize("width", [40, 60, 80, 120])
    def test_a_frame_fits_the_terminal(self, tmp_path, width):
        text = shown(settled(Follower(write_collapsing_run(tmp_path / ("long" * 30)))), width=width)
        assert max(map(len, text.splitlines())) <= width

    def test_a_frame_of_a_whole_run_fits_a_terminal_of_24_lines(self, tmp_path):
        assert len(shown(settled(Follower(write_collapsing_run(tmp_path / "opd")))).splitlines()) <= 24

    def test_a_brief_frame_fits_24_lines_with_everything_on(self, tmp_path):
        rows = [
            {"step": step, **dict.fromkeys((
                "completions/mean_length", "completions/clipped_ratio", "health/loop_token_fraction", "reward",
                "health/repetition_rate", "health/stop_probe", "health/ending_probe", "eval/a/accuracy",
                "eval/a_greedy/accuracy", "controller/gold_coef", "controller/reference_coef", "controller/level",
            ), 0.3)}
            for step in range(1, 9)
        ]  # fmt: skip
        write_lines(tmp_path / "metrics.jsonl", rows)
        action = {**ALERT, "rule": "controller", "action": "raise"}
        write_lines(tmp_path / "alerts.jsonl", [{**ALERT, "message": "words " * 200}, action] * 5)
        snapshot = settled(Follower(tmp_path))
        assert len(shown(snapshot).splitlines()) > 24
        assert len(shown(snapshot, brief=True).splitlines()) <= 24

    @pytest.mark.parametrize(("last_step", "stands"), [(20, True), (40, False)])
    def test_an_alert_on_a_figure_made_from_its_signal_stands_for_a_while(self, tmp_path, last_step, stands):
        rows = [{"step": step, "health/ending_probe": 0.59 if step < 5 else 0.5} for step in range(1, last_step)]
        write_lines(tmp_path / "metrics.jsonl", rows)
        fall = {"signal": "health/ending_probe", "value": 0.14, "threshold": 0.1, "step": 10}
        write_lines(tmp_path / "alerts.jsonl", [{**ALERT, **fall}])
        assert bool(settled(Follower(tmp_path)).standing) == stands

    def test_an_alert_that_was_raised_again_stands_once(self, tmp_path):
        write_lines(tmp_path / "metrics.jsonl", [{"step": 3, "health/loop_token_fraction": 0.3}])
        write_lines(tmp_path / "alerts.jsonl", [ALERT, {**ALERT, "severity": "critical", "threshold": 0.2}])
        assert [alert.severity for alert in settled(Follower(tmp_path)).standing] == ["critical"]

    def test_an_alert_whose_signal_came_back_does_not_stand(self, tmp_path):
        rows = [{"step": step, "health/loop_token_fraction": 0.3 if step < 5 else 0.0} for step in range(1, 20)]
        write_lines(tmp_path / "metrics.jsonl", rows)
        write_lines(tmp_path / "alerts.jsonl", [ALERT])
        assert settled(Follower(tmp_path)).standing == ()
        assert once(tmp_path)[0] == 0

    def test_an_alert_whose_signal_is_still_beyond_makes_the_exit_status_1(self, tmp_path):
        write_lines(tmp_path / "metrics.jsonl", [{"step": 3, "health/loop_token_fraction": 0.3}])
        write_lines(tmp_path / "alerts.jsonl", [ALERT])
        status, text = once(tmp_path)
        assert status == 1
        assert "1 alert still standing" in text

    def test_actions_of_the_controller_are_shown_apart_and_are_no_alarm(self, tmp_path):
        action = {**ALERT, "rule": "controller", "action": "raise", "message": "gold coefficient 1 -> 2"}
        row = {"step": 3, "controller/gold_coef": 2.0, "controller/reference_coef": 0.2, "controller/level": 1}
        write_lines(tmp_path / "metrics.jsonl", [row])
        write_lines(tmp_path / "alerts.jsonl", [action])
        status, text = once(tmp_path)
        assert status == 0
        assert re.search(r"action\nstep +3  raise: gold coefficient 1 -> 2", text)
        for label in ("gold coef.", "reference coef.", "level"):
            assert label in text

    def test_only_appended_lines_are_taken_in(self, tmp_path):
        write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "completions/mean_length": 10.0}])
        follower = Follower(tmp_path)
        assert settled(follower).last_step == 1
        append(tmp_path / "metrics.jsonl", {"step": 2, "completions/mean_length": 11.0})
        assert settled(follower).values("completions/mean_length") == [(1, 10.0), (2, 11.0)]

    def test_a_torn_last_line_is_neither_shown_nor_complained_about(self, tmp_path):
        write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "loss')
        snapshot = settled(Follower(tmp_path))
        assert (snapshot.last_step, snapshot.notes) == (1, ())

    def test_a_resumed_run_forgets_what_was_cut_off(self, tmp_path):
        write_collapsing_run(tmp_path / "run")
        follower = Follower(tmp_path / "run")
        assert settled(follower).verdict.status == "collapsed"
        for name in ("metrics.jsonl", "alerts.jsonl"):  # as the recorder does it
            path = tmp_path / "run" / name
            kept = [line for line in path.read_text().splitlines(True) if json.loads(line)["step"] <= 40]
            (tmp_path / "aside").write_text("".join(kept))
            (tmp_path / "aside").replace(path)
        snapshot = settled(follower)
        assert (snapshot.last_step, snapshot.alerts, snapshot.verdict.status) == (40, (), "healthy")
        assert "resumed once" in shown(snapshot)
        append(tmp_path / "run" / "metrics.jsonl", {"step": 41, "completions/mean_length": 5.0})
        assert settled(follower).last_step == 41

    def test_a_folder_removed_and_made_again_is_followed(self, tmp_path):
        run = tmp_path / "run"
        write_lines(run / "metrics.jsonl", [{"step": 5}])
        follower = Follower(run)
        settled(follower)
        (run / "metrics.jsonl").unlink()
        run.rmdir()
        assert "does not exist" in settled(follower).problem
        write_lines(run / "metrics.jsonl", [{"step": 1}])
        snapshot = settled(follower)
        assert (snapshot.last_step, snapshot.problem) == (1, None)

    def test_a_folder_that_does_not_exist_yet_is_waited_for(self, tmp_path):
        follower = Follower(tmp_path / "later")
        text = shown(settled(follower))
        assert "does not exist" in " ".join(text.split())
        assert "waiting" in text
        write_healthy_run(tmp_path / "later")
        assert "Healthy" in shown(settled(follower))

    def test_a_run_before_its_first_step_is_no_problem(self, tmp_path):
        (tmp_path / "config.yaml").write_text("max_steps: 10\n")
        status, text = once(tmp_path)
        assert status == 0
        assert "no step yet" in text

    @pytest.mark.parametrize("name", ["metrics.jsonl", "alerts.jsonl"])
    def test_a_file_of_a_run_folder_means_the_folder(self, tmp_path, name):
        write_healthy_run(tmp_path / "stable")
        assert settled(Follower(tmp_path / "stable" / name)).name == "stable"

    def test_junk_among_the_lines_is_counted_and_passed_over(self, tmp_path):
        path = write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
        with path.open("ab") as file:
            file.write(b'nonsense\n[1]\n\xff\xfe\n{"loss": 1}\n{"step": "x"}\n\n' + b"[" * 50_000 + b"\n")
        append(path, {"step": 2, "completions/mean_length": None, "loss": "high"})
        append(tmp_path / "alerts.jsonl", {"step": 1}, {"step": 1, "message": ["odd"], "severity": 5, "value": "x"})
        (tmp_path / "config.yaml").write_text("max_steps: [1\n")
        snapshot = settled(Follower(tmp_path))
        assert snapshot.last_step == 2
        assert "6 lines of metrics.jsonl cannot be used (last: line 8)" in snapshot.notes
        assert len(snapshot.alerts) == 1
        shown(snapshot)

    def test_what_a_model_wrote_cannot_steer_the_terminal(self, tmp_path):
        message = "[bold red]seen[/] \x1b[2J\x07 \u202e\r\nnext [/nothing]"
        write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "eval/\x1b[31m[x]/accuracy": 0.5}])
        append(tmp_path / "alerts.jsonl", {**ALERT, "message": message, "rule": "[red]\x1b", "action": "none"})
        text = shown(settled(Follower(tmp_path)))
        assert "[bold red]seen[/] \ufffd[2J\ufffd \ufffd next [/nothing]" in " ".join(text.split())
        assert not set(text) & set("\x1b\x07\r\u202e")

    def test_a_run_that_writes_nothing_for_long_may_have_stopped(self, tmp_path):
        write_lines(tmp_path / "metrics.jsonl", [{"step": 4, "step_time": 2.0}])
        (tmp_path / "config.yaml").write_text("max_steps: 10\n")
        snapshot = settled(Follower(tmp_path))
        now = snapshot.modified_at
        assert "step 4 of 10  2 s a step  about 12 s to go  written 30 s ago" in shown(snapshot, now=now + 30)
        assert "nothing written for 10 min 0 s: stopped?" in " ".join(shown(snapshot, now=now + 600).split())

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_a_file_that_may_not_be_read_is_said(self, tmp_path):
        write_lines(tmp_path / "metrics.jsonl", [{"step": 1}]).chmod(0)
        assert "Permission denied" in settled(Follower(tmp_path)).problem

    def test_a_disk_that_fails_for_a_while_is_said_and_what_was_read_stays(self, tmp_path):
        path = write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
        follower = Follower(tmp_path)
        settled(follower)
        kept = path.rename(tmp_path / "kept")
        path.symlink_to(path.name)
        snapshot = follower.poll()
        assert "cannot be read now" in snapshot.problem
        assert snapshot.last_step == 1
        path.unlink()
        kept.rename(path)
        append(path, {"step": 2})
        snapshot = settled(follower)
        assert (snapshot.last_step, snapshot.problem, snapshot.restarts) == (2, None, 0)

    @pytest.mark.parametrize("make", ["missing", "empty folder", "binary", "fifo"])
    def test_bad_input_is_refused_when_asked_once(self, tmp_path, make):
        path = tmp_path / "here"
        if make == "empty folder":
            path.mkdir()
        elif make == "binary":
            path = tmp_path / "here.jsonl"
            path.write_bytes(os.urandom(3000))
        elif make == "fifo":
            path = tmp_path / "here.jsonl"
            os.mkfifo(path)
        with pytest.raises(RunFolderError, match="here"):
            once(path)


class TestRollouts:
    def rollouts(self, step: int, number: int, *, looping: int = 0) -> list[dict]:
        return [
            {"step": step, "completion": LOOP * 300 if index < looping else f"The answer is {index}.",
             "num_tokens": 3000 if index < looping else 6, "finish_reason": "length" if index < looping else "stop"}
            for index in range(number)
        ]  # fmt: skip

    def test_figures_are_taken_by_step(self, tmp_path):
        path = write_lines(tmp_path / "r.jsonl", self.rollouts(1, 4) + self.rollouts(2, 4, looping=1))
        snapshot = settled(Follower(path))
        assert snapshot.values("completions/mean_length") == [(1, 6.0), (2, (3000 + 18) / 4)]
        assert snapshot.values("completions/clipped_ratio") == [(1, 0.0), (2, 0.25)]
        assert snapshot.values("health/repetition_rate") == [(1, 0.0), (2, 0.25)]
        assert snapshot.values("health/loop_token_fraction")[1][1] > 0.9

    def test_a_growing_file_that_collapses_raises_alerts_and_ends_in_1(self, tmp_path):
        path = tmp_path / "r.jsonl"
        follower = Follower(path)
        assert "does not exist" in settled(follower).problem
        for step in range(1, 21):
            append(path, *self.rollouts(step, 8, looping=0 if step < 10 else 6))
            snapshot = settled(follower)
            assert snapshot.last_step == step
        assert {alert.rule for alert in snapshot.alerts} >= {"loops", "truncation"}
        assert snapshot.verdict.status == "collapsed"
        assert once(path)[0] == 1

    def test_following_a_file_gives_what_reading_it_at_once_gives(self, tmp_path):
        path = tmp_path / "r.jsonl"
        path.touch()
        follower = Follower(path)
        for step in range(1, 13):
            for rollout in self.rollouts(step, 4, looping=step // 3):
                append(path, rollout)
                follower.poll()
        grown, whole = settled(follower), settled(Follower(path))
        assert (grown.rows, grown.alerts, grown.verdict) == (whole.rows, whole.alerts, whole.verdict)
        assert grown.alerts

    def test_a_healthy_file_ends_in_0(self, tmp_path):
        lines = [line for step in range(1, 15) for line in self.rollouts(step, 8)]
        assert once(write_lines(tmp_path / "r.jsonl", lines))[0] == 0

    @pytest.mark.parametrize("column", ["completion", "text", "output"])
    def test_text_is_found_in_the_usual_columns_and_lines_are_grouped_without_a_step(self, tmp_path, column):
        lines = [{column: "Some words and no end of it."} for _ in range(130)]
        snapshot = settled(Follower(write_lines(tmp_path / "r.jsonl", lines)))
        assert [row["step"] for row in snapshot.rows] == [1, 2, 3]
        assert snapshot.values("characters/mean_length") == [(1, 28.0), (2, 28.0), (3, 28.0)]
        assert snapshot.values("completions/clipped_ratio") == [], "what is not told is not claimed"
        assert "mean characters" in shown(snapshot)

    def test_of_chat_messages_the_last_one_counts(self, tmp_path):
        chat = [{"role": "user", "content": "long " * 100}, {"role": "assistant", "content": "short"}]
        snapshot = settled(Follower(write_lines(tmp_path / "r.jsonl", [{"completion": chat}])))
        assert snapshot.values("characters/mean_length") == [(1, 5.0)]

    def test_a_file_that_begins_anew_is_read_anew(self, tmp_path):
        path = write_lines(tmp_path / "r.jsonl", self.rollouts(9, 4))
        follower = Follower(path)
        settled(follower)
        write_lines(path, self.rollouts(1, 2))
        snapshot = settled(follower)
        assert ([row["step"] for row in snapshot.rows], snapshot.restarts) == ([1.0], 1)

    def test_a_step_back_in_the_file_replaces_what_followed(self, tmp_path):
        lines = [line for step in (1, 2, 3, 2) for line in self.rollouts(step, 2)]
        snapshot = settled(Follower(write_lines(tmp_path / "r.jsonl", lines)))
        assert [row["step"] for row in snapshot.rows] == [1, 2]

    def test_texts_that_are_no_utf8_or_odd_do_no_harm(self, tmp_path):
        path = write_lines(tmp_path / "r.jsonl", [{"text": "\ud800\x00"}, {"text": ""}, {"text": "字" * 200}])
        append(path, {"text": 5}, {"nothing": 1})
        snapshot = settled(Follower(path))
        assert snapshot.values("health/loop_token_fraction")[0][1] == pytest.approx(200 / 202, abs=0.02)
        assert "2 lines of r.jsonl cannot be used (last: line 5)" in snapshot.notes

    def test_an_empty_file_is_bad_input(self, tmp_path):
        (tmp_path / "r.jsonl").touch()
        with pytest.raises(RunFolderError, match="holds no rollouts"):
            once(tmp_path / "r.jsonl")


class TestTerminal:
    def test_a_disk_that_does_not_answer_leaves_the_watch_alive(self):
        answered = threading.Event()
        snapshot = settled(Follower(Path("nowhere")))

        def poll() -> Snapshot:
            answered.wait(30)
            return snapshot

        lookout = Lookout(poll)
        begin = time.monotonic()
        assert lookout.look(0.05) is None
        assert lookout.look(0.05) is None, "the same poll is waited for, no second one is begun"
        assert time.monotonic() - begin < 2
        assert lookout.delay_s > 0.05
        answered.set()
        assert lookout.look(5) is snapshot
        assert lookout.delay_s == 0.0

    def test_an_error_of_a_poll_is_raised_where_it_is_looked_at(self):
        def poll() -> Snapshot:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            Lookout(poll).look(5)

    def test_without_a_terminal_a_frame_is_printed_only_when_something_changed(self, tmp_path):
        write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
        console = Console(file=io.StringIO(), width=80)
        threading.Thread(target=follow, args=(tmp_path, console), kwargs={"interval_s": 0.01}, daemon=True).start()
        wait_for(lambda: "step 1" in console.file.getvalue())
        time.sleep(0.3)
        assert console.file.getvalue().count("run ") == 1
        append(tmp_path / "metrics.jsonl", {"step": 2})
        wait_for(lambda: "step 2" in console.file.getvalue())
        time.sleep(0.3)
        assert console.file.getvalue().count("run ") == 2


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_max_steps_come_from_the_configuration_and_may_grow(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    follower = Follower(tmp_path)
    assert settled(follower).max_steps is None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"max_steps": 10}))
    assert settled(follower).max_steps == 10
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"max_steps": 2000}))
    assert settled(follower).max_steps == 2000


def test_growth_of_rollouts_whose_tokens_nobody_counted_is_judged_in_characters(tmp_path):
    rng = random.Random(0)
    lines = [
        json.dumps({"step": step, "text": " ".join(str(rng.random()) for _ in range(20 if step < 10 else 200))})
        for step in range(20)
        for _ in range(32)
    ]
    path = tmp_path / "grow.jsonl"
    path.write_text("\n".join(lines) + "\n")
    alerts = RolloutSource(path).poll().alerts
    assert ("length_growth", "critical") in [(alert.rule, alert.severity) for alert in alerts]
    assert all("characters on average" in alert.message for alert in alerts)
