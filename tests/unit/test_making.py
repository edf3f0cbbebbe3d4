"""Folders that are whole or not there, whoever else makes them, and that say what they were made with."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from stableopd.errors import RunFolderError
from stableopd.lines import made_whole
from stableopd.toy.making import is_made, making
from stableopd.toy.pieces import write_data as write_toy_data
from stableopd.toy.task import World
from stableopd.words.pieces import made_with, write_data
from stableopd.words.settings import PRESETS

MAKER = """
import sys, time
from pathlib import Path
from stableopd.lines import made_whole
folder, name = Path(sys.argv[1]), sys.argv[2]
with made_whole(folder) as aside:
    print(aside.name, flush=True)
    for number in range(5):
        (aside / f"{number}.txt").write_text(name)
        time.sleep(float(sys.argv[3]))
"""


def maker(folder, name: str, pause_s: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", MAKER, str(folder), name, str(pause_s)], stdout=subprocess.PIPE, text=True
    )


def test_of_processes_that_make_the_same_folder_one_is_kept_whole(tmp_path):
    processes = [maker(tmp_path / "piece", name, 0.1) for name in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    written = {path.name: path.read_text() for path in (tmp_path / "piece").iterdir()}
    assert set(written) == {f"{number}.txt" for number in range(5)}
    assert len(set(written.values())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["piece"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path):
    killed, living = maker(tmp_path / "piece", "killed", 60), maker(tmp_path / "piece", "living", 60)
    try:
        begun = {tmp_path / process.stdout.readline().strip() for process in (killed, living)}
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not all(path.exists() for path in begun):
            time.sleep(0.01)
        with made_whole(tmp_path / "piece") as aside:
            (aside / "0.txt").write_text("mine")
        left = {path for path in tmp_path.iterdir() if path.name != "piece"}
        assert left < begun
        assert len(left) == 1
        assert str(living.pid) in left.pop().name
    finally:
        living.kill()
        living.wait()


def test_the_folder_that_was_there_first_is_kept_and_a_failure_leaves_nothing(tmp_path):
    with made_whole(tmp_path / "piece") as aside:
        (aside / "a").write_text("late")
        (tmp_path / "piece").mkdir()
        (tmp_path / "piece" / "a").write_text("first")
    assert (tmp_path / "piece" / "a").read_text() == "first"
    with pytest.raises(KeyError), made_whole(tmp_path / "other"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["piece"]


def test_a_piece_made_with_something_else_is_refused_and_an_older_one_taken(tmp_path):
    made = {"piece": "teacher", "seed": 1, "world": {"sizes": (1, 2)}}
    assert not is_made(tmp_path / "piece", made)
    with making(tmp_path / "piece", made):
        pass
    assert is_made(tmp_path / "piece", made)
    with pytest.raises(RunFolderError, match=r"piece was made with other settings .*seed: 1, not 2.*another folder"):
        is_made(tmp_path / "piece", {**made, "seed": 2})
    (tmp_path / "piece" / "made.json").unlink()
    assert is_made(tmp_path / "piece", {**made, "seed": 2})


def test_a_process_that_was_slower_does_not_take_a_piece_of_other_settings(tmp_path):
    def make_late() -> None:
        with making(tmp_path / "piece", {"seed": 1}):
            with making(tmp_path / "other", {"seed": 2}):
                pass
            (tmp_path / "other").rename(tmp_path / "piece")

    with pytest.raises(RunFolderError, match="seed: 2, not 1"):
        make_late()


def test_data_of_another_preset_is_refused(tmp_path):
    quick = replace(PRESETS["quick"], num_train=5, num_validation=2)
    write_data(tmp_path / "data", quick)
    write_data(tmp_path / "data", quick)
    with pytest.raises(RunFolderError, match="num_train: 5, not 6"):
        write_data(tmp_path / "data", replace(quick, num_train=6))
    write_toy_data(tmp_path / "toy", World.t4(), pool_size=20)
    write_toy_data(tmp_path / "toy", World.t4(), pool_size=20)
    with pytest.raises(RunFolderError, match=r"world.terse_fraction: 0.4, not 0.0"):
        write_toy_data(tmp_path / "toy", World.a(), pool_size=20)


def test_a_piece_depends_on_its_seed_and_size_and_not_on_the_run():
    cpu = PRESETS["cpu"]
    assert made_with("teacher", cpu, 1) != made_with("teacher", cpu, 2)
    assert made_with("teacher", cpu) != made_with("teacher", PRESETS["cpu-1m"])
    assert made_with("data", cpu) == made_with("data", PRESETS["cpu-1m"])
    other_run = replace(cpu, run=replace(cpu.run, learning_rate=1.0), student=PRESETS["cpu-1m"].student)
    assert made_with("teacher", cpu) == made_with("teacher", other_run)


@pytest.mark.parametrize("module", ["toy", "words"])
def test_the_command_says_so_in_one_line(tmp_path, module):
    with making(tmp_path / "data", {"piece": "data", "seed": 9}):
        pass
    command = [sys.executable, "-m", f"stableopd.{module}.pieces", "data", str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "was made with other settings" in done.stderr
