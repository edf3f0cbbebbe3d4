"""Watching and being told, with real processes: a pseudo-terminal, a training run, a program that is called."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stableopd import StableOPDConfig, StableOPDTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from fake_runs import write_collapsing_run, write_healthy_run, write_lines

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "stableopd", "watch", *map(str, arguments)]


def watch(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, **changes}
    return subprocess.run(command(*arguments), env=environment, capture_output=True, text=True, timeout=60, check=False)


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self.main, other = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments), env=ENVIRONMENT, stdin=other, stdout=other, stderr=other, start_new_session=True
        )
        os.close(other)
        self.text = ""

    def read_until(self, words: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self.main], [], [], 0.1)[0]:
                self.text += os.read(self.main, 65536).decode(errors="replace")

    def interrupt(self) -> float:
        """Ctrl-C; seconds until the process has ended."""
        begin = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=10)
        while select.select([self.main], [], [], 0.1)[0]:
            try:
                self.text += os.read(self.main, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
        os.close(self.main)
        return time.monotonic() - begin


def test_once_ends_with_the_health_of_the_run(tmp_path):
    healthy = watch(write_healthy_run(tmp_path / "stable"), "--once")
    assert (healthy.returncode, healthy.stderr) == (0, "")
    assert "Healthy" in healthy.stdout
    collapsed = watch(write_collapsing_run(tmp_path / "opd"), "--once")
    assert collapsed.returncode == 1
    assert max(map(len, collapsed.stdout.splitlines())) <= 80
    assert "\x1b" not in collapsed.stdout
    absent = watch(tmp_path / "absent", "--once")
    assert absent.returncode == 2
    assert "does not exist" in absent.stderr
    assert "Traceback" not in absent.stderr


def test_an_encoding_without_block_characters_is_no_error(tmp_path):
    done = watch(write_healthy_run(tmp_path / "stable"), "--once", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "????" in done.stdout


def test_a_terminal_follows_a_run_from_before_its_folder_to_ctrl_c(tmp_path):
    run = tmp_path / "later"
    terminal = Terminal(run, "--interval", "0.1")
    terminal.read_until("waiting")
    write_lines(run / "metrics.jsonl", [{"step": 1, "completions/mean_length": 10.0}])
    terminal.read_until("step 1")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "completions/mean_length": 123')
        file.flush()
        time.sleep(0.3)
        assert "step 2" not in terminal.text
        file.write("45.0}\n")
    terminal.read_until("12,345.0")
    assert terminal.interrupt() < 2.0
    assert terminal.process.returncode == 130
    assert "Traceback" not in terminal.text
    assert "\x1b[?25h" in terminal.text, "the cursor is shown again"


def test_an_interval_of_an_hour_does_not_hold_up_ctrl_c(tmp_path):
    terminal = Terminal(write_healthy_run(tmp_path / "stable"), "--interval", "3600")
    terminal.read_until("Healthy")
    assert terminal.interrupt() < 2.0
    assert "Traceback" not in terminal.text


@pytest.fixture
def tell(tmp_path) -> list[str]:
    """A program that writes what it is told to a file."""
    script = tmp_path / "tell.py"
    script.write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')")
    return [sys.executable, str(script), str(tmp_path / "told")]


ALARMING = {"max_expected_length": 1, "tail_chars": 8, "compression_threshold": 2.2}
"""Every run is longer than this."""


def test_a_training_run_calls_the_command_with_its_alerts(run_settings, tmp_path, tell):
    settings = run_settings(max_steps=2, health={**ALARMING, "notify": {"command": tell}})
    StableOPDTrainer(args=StableOPDConfig(**settings)).train()
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    logged = [json.loads(line) for line in (tmp_path / "run" / "alerts.jsonl").read_text().splitlines()]
    assert logged
    assert [{key: alert[key] for key in logged[0]} for alert in told] == [a for a in logged if a["severity"] != "info"]
    assert {alert["run"] for alert in told} == {"run"}


@pytest.mark.parametrize("notify", [{"command": ["no-such-program"]}, {"command": ["sleep", "60"], "timeout_s": 0.5}])
def test_a_run_with_a_broken_command_is_the_same_run(run_settings, tmp_path, notify):
    def trained(name: str, health: dict) -> list[dict]:
        folder = tmp_path / name
        settings = run_settings(max_steps=2, output_dir=str(folder), health={**ALARMING, **health})
        StableOPDTrainer(args=StableOPDConfig(**settings)).train()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "step_time"} for row in rows]

    begin = time.monotonic()
    broken = trained("broken", {"notify": notify})
    took = time.monotonic() - begin
    assert broken == trained("quiet", {})
    assert took < 30


def test_a_run_may_be_resumed_with_another_receiver(run_settings, tmp_path, tell):
    StableOPDTrainer(args=StableOPDConfig(**run_settings(max_steps=2))).train()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["health"]["notify"] is None
    settings = run_settings(max_steps=3, health={"notify": {"command": tell}})
    StableOPDTrainer(args=StableOPDConfig(**settings)).train(resume_from_checkpoint=True)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["health"]["notify"]["command"] == tell
