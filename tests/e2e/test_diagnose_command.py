"""`stableopd diagnose` as a user types it: every format, exit status, JSON, memory."""

from __future__ import annotations

import json
import os
import pty
import random
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from fake_runs import write_collapsing_run
from rollout_makers import looping, prose, texts_by_step, write_json_lines, write_slime, write_trl, write_verl

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
COMMAND = [sys.executable, "-m", "stableopd", "diagnose"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def write_text(path: Path, texts: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(text.replace("\n", " ") + "\n" for texts in texts for text in texts))
    return path


def write_plain(path: Path, texts: list[list[str]]) -> Path:
    rows = [{"step": step, "response": text} for step, texts in enumerate(texts) for text in texts]
    return write_json_lines(path, rows)


WRITERS = {
    "trl": write_trl,
    "verl": write_verl,
    "slime": write_slime,
    "jsonl": lambda path, texts: write_plain(path / "a.jsonl", texts),
    "text": lambda path, texts: write_text(path / "a.txt", texts),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_told_by_its_content_and_the_exit_status_tells_the_verdict(tmp_path, name):
    well = run(WRITERS[name](tmp_path / "well", texts_by_step(steps=8)))
    assert (well.returncode, well.stderr) == (0, "")
    assert f" {name}; 256 rollouts)" in " ".join(well.stdout.split())  # a long path breaks the line
    assert "Healthy" in well.stdout
    path = WRITERS[name](tmp_path / "sick", texts_by_step(steps=8, onset=1))
    sick = run(path)
    assert sick.returncode == 1, sick.stderr
    for words in ("likely cause: ", "what to do: ", "worst 1", "⟦", "⟧ × 60.", "period 31"):
        assert words in sick.stdout
    assert sick.stdout == run(path, "--format", name).stdout


def test_a_run_folder_gives_one_json_document(tmp_path):
    done = run(write_collapsing_run(tmp_path / "opd"), "--json", "--samples", 1)
    assert (done.returncode, done.stderr) == (1, "")
    (diagnosis,) = json.loads(done.stdout)["runs"]
    assert diagnosis["verdict"]["status"] == "collapsed"
    assert len(diagnosis["samples"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.jsonl"], "does not exist"),
        (["empty.jsonl"], "empty"),
        (["broken.jsonl"], "line 1"),
        (["half.jsonl", "--strict"], "half.jsonl, line 2"),
        (["half.jsonl", "--format", "parquet"], "--format"),
        (["half.jsonl", "--format", "trl"], "Parquet"),
        (["half.jsonl", "--format", "slime"], "torch file"),
        (["half.jsonl", "--max-length", "0"], "max-length"),
        ([], "PATH"),
    ],
)
def test_bad_input_is_one_message_and_status_2(tmp_path, arguments, words):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    (tmp_path / "half.jsonl").write_text('{"text": "x"}\n{"text": \n')
    done = run(*[tmp_path / name if name.endswith(".jsonl") else name for name in arguments])
    assert done.returncode == 2
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_about_a_file_with_terminal_escapes_in_its_name_writes_none(tmp_path):
    path = tmp_path / "\x1b]0;owned\x07[bold].jsonl"
    path.write_text("")
    done = run(path)
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
    assert "[bold].jsonl" in done.stderr


def test_a_terminal_without_unicode_gets_question_marks(tmp_path):
    path = write_plain(tmp_path / "a.jsonl", texts_by_step(steps=2))
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, str(path)], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mean length (characters)  ??" in done.stdout


def test_a_file_that_is_broken_for_the_most_part_gets_no_clean_bill(tmp_path):
    path = tmp_path / "junk.jsonl"
    path.write_text('{"text": "x"}\n' * 5 + "junk\n" * 11)
    done = run(path, "--format", "jsonl")
    assert done.returncode == 2
    assert "11 lines are broken and 5 are not" in " ".join(done.stderr.split())


def test_broken_lines_are_named_and_skipped(tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_bytes(b'{"text": "x"}\n{"text": \n\xff\xfe\n')
    done = run(path)
    assert done.returncode == 0
    assert "half.jsonl, line 2: it is not JSON" in done.stdout
    assert "half.jsonl, line 3: it is not UTF-8" in done.stdout


def test_torch_is_not_needed(tmp_path):
    path = write_plain(tmp_path / "a.jsonl", texts_by_step(steps=2))
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"sys.argv = ['stableopd', 'diagnose', {str(path)!r}]\n"
        "from stableopd.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_bar_is_shown_on_a_terminal_and_terminal_escapes_of_a_completion_are_not(tmp_path):
    rng = random.Random(0)
    texts = ["\x1b]0;owned\x07\x1b[2J" + looping(rng) for _ in range(60)]
    path = write_json_lines(tmp_path / "a.jsonl", [{"completion": text, "prompt": "\x1b[5m"} for text in texts])
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, str(path)], stdout=theirs, stderr=theirs, stdin=theirs,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"})  # fmt: skip
    os.close(theirs)
    output = bytearray()
    try:
        while piece := os.read(ours, 65536):
            output += piece
    except OSError:  # what Linux says when the other end is closed
        pass
    assert process.wait() == 1
    assert b"reading" in output
    for forbidden in (b"\x1b]", b"\x07", b"\x1b[2J", b"\x1b[5m"):
        assert forbidden not in output
    assert "␛]0;owned".encode() in output


# ------------------------------------------------------------------------------------ memory


MEASURED = """
import sys
from pathlib import Path
from stableopd.cli import main
try:
    main()
except SystemExit as ended:
    assert ended.code in (0, 1), ended.code
# Of this program alone: what the operating system tells the parent includes the parent's own memory before the start.
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def peak_mib(path: Path) -> float:
    """Greatest resident memory of the command, MiB."""
    command = [sys.executable, "-c", MEASURED, "diagnose", str(path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1].split()[1]) / 1024


def write_large(path: Path, mib: int) -> Path:
    """Completions of some 6,000 characters, 16 a step, an eighth of them looping; steps in no order."""
    rng = random.Random(0)
    pool = [looping(rng, 150) if n % 8 == 0 else " ".join(prose(rng, 60) for _ in range(16)) for n in range(256)]
    with path.open("w") as file:
        row = 0
        while file.tell() < mib * 2**20:
            step = row // 16 ^ 5
            file.write(json.dumps({"step": step, "completion": f"{row} {rng.choice(pool)}"}) + "\n")
            row += 1
    return path


on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")


@on_linux
@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    small, large = (peak_mib(write_large(tmp_path / f"{mib}.jsonl", mib)) for mib in (5, 50))
    assert large < small + 12


@on_linux
@pytest.mark.slow
def test_memory_does_not_grow_with_a_parquet_table(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    pool = [" ".join(prose(rng, 60) for _ in range(20)) for _ in range(64)]
    peaks = []
    for rows in (500, 5_000):
        path = tmp_path / f"{rows}.parquet"
        texts = [f"{row} {rng.choice(pool)} {row}" for row in range(rows)]
        pq.write_table(pa.table({"step": [row // 16 for row in range(rows)], "completion": texts}), path)
        peaks.append(peak_mib(path))
    assert path.stat().st_size < sum(map(len, texts)) > 30e6  # one row group
    assert peaks[1] < peaks[0] + 24
