from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from fake_runs import write_collapsing_run, write_healthy_run, write_lines

from stableopd import runfolder
from stableopd.errors import RunFolderError
from stableopd.runfolder import ROLLOUTS_PER_STEP, read_run, read_runs, verdict_of
from stableopd.types import Alert


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_collapsing_run(tmp_path / "opd")


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_reading_a_run_folder_needs_no_torch(run: Path) -> None:
    code = (
        "import sys; from stableopd.runfolder import read_run; read_run(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run)], check=False).returncode == 0


def test_a_whole_run_is_read(run: Path) -> None:
    record = read_run(run)
    assert record.name == "opd"
    assert record.config["method"] == "opd"
    assert record.environment["torch"] == "2.11.0"
    assert [row["step"] for row in record.metrics] == list(range(101))
    assert [alert.severity for alert in record.alerts] == ["warning", "critical"]
    assert record.verdict.status == "collapsed"
    assert record.evaluations == ("held_out",)
    assert record.last_step == 100


def test_a_healthy_run_is_judged_healthy(tmp_path: Path) -> None:
    assert read_run(write_healthy_run(tmp_path / "stableopd")).verdict.status == "healthy"


def test_a_torn_last_line_is_left_out(run: Path) -> None:
    for name in ("metrics.jsonl", "alerts.jsonl", "rollouts/step-000100.jsonl"):
        with (run / name).open("ab") as file:
            file.write('{"step": 101, "loss": 0.5, "completion": "é'.encode()[:-1])
    record = read_run(run)
    assert record.last_step == 100
    assert len(record.alerts) == 2


@pytest.mark.parametrize("line", ['{"step": 3, "lo', "[1, 2]", '{"loss": 1.0}', '{"step": "three"}', '{"step": true}'])
def test_a_broken_line_in_the_middle_is_named(run: Path, line: str) -> None:
    append(run / "metrics.jsonl", line + '\n{"step": 102}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:102: "):
        read_run(run)


def test_a_broken_alert_in_the_middle_is_named(run: Path) -> None:
    append(run / "alerts.jsonl", 'oops\n{"step": 1, "message": "m"}\n')
    with pytest.raises(RunFolderError, match=r"alerts\.jsonl:3: "):
        read_run(run)


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.jsonl", "alerts.jsonl"])
def test_any_one_file_may_be_missing(run: Path, name: str) -> None:
    (run / name).unlink()
    assert read_run(run).name == "opd"


def test_a_run_that_never_made_a_step_has_an_unknown_verdict(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    record = read_run(run)
    assert record.verdict.status == "unknown"
    assert record.last_step is None


def test_a_torn_environment_is_as_good_as_none(run: Path) -> None:
    (run / "environment.json").write_text('{"python": "3.1')
    assert read_run(run).environment == {}


def test_broken_yaml_is_named_with_its_line(run: Path) -> None:
    (run / "config.yaml").write_text("method: opd\nseed: [1, 2\n")
    with pytest.raises(RunFolderError, match=r"config\.yaml:\d"):
        read_run(run)


def test_a_configuration_must_be_a_mapping(run: Path) -> None:
    (run / "config.yaml").write_text("- opd\n")
    with pytest.raises(RunFolderError, match="mapping"):
        read_run(run)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"does not exist.*metrics\.jsonl"):
        read_run(tmp_path / "nowhere")


def test_a_file_is_refused(run: Path) -> None:
    with pytest.raises(RunFolderError, match="is a file"):
        read_run(run / "metrics.jsonl")


def test_a_folder_of_runs_is_refused_and_the_runs_in_it_are_named(run: Path) -> None:
    with pytest.raises(RunFolderError, match=r"neither metrics\.jsonl nor config.yaml.*Did you mean .*opd\?"):
        read_run(run.parent)


def test_a_step_back_replaces_what_followed_it(run: Path) -> None:
    append(run / "metrics.jsonl", '{"step": 98, "loss": 7.0}\n{"step": 99, "loss": 8.0}\n')
    record = read_run(run)
    assert record.last_step == 99
    assert record.values("loss")[-1] == (99, 8.0)


def test_lines_of_one_step_are_merged(run: Path) -> None:
    append(run / "metrics.jsonl", '{"step": 101, "loss": 1.0}\n{"step": 101, "eval/held_out/accuracy": 0.5}\n')
    assert read_run(run).metrics[-1] == {"step": 101, "loss": 1.0, "eval/held_out/accuracy": 0.5}


def test_a_series_keeps_nan_and_leaves_out_what_is_no_number(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 1}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": "x"}, {"step": 4, "loss": None}]
    write_lines(tmp_path / "metrics.jsonl", [*rows, {"step": 5, "loss": math.inf}, {"step": 6, "loss": True}])
    record = read_run(tmp_path)
    assert [step for step, _ in record.series("loss")] == [1, 2, 5]
    assert record.values("loss") == [(1, 1.0)]


def test_first_middle_worst_and_last_rollouts_are_sampled(run: Path) -> None:
    samples = read_run(run).rollouts
    assert samples[0].label == "first"
    assert {sample.label for sample in samples} >= {"first", "worst"}
    assert [sample.step for sample in samples] == sorted({sample.step for sample in samples})
    assert all(len(sample.rollouts) == ROLLOUTS_PER_STEP for sample in samples)


def test_the_worst_step_shows_failed_rollouts_first(run: Path) -> None:
    worst = next(sample for sample in read_run(run).rollouts if sample.label == "worst")
    assert all(rollout.failed for rollout in worst.rollouts)


def test_samples_of_a_healthy_step_come_from_different_prompts(run: Path) -> None:
    first = read_run(run).rollouts[0]
    assert len({rollout.prompt for rollout in first.rollouts}) == ROLLOUTS_PER_STEP


def test_only_the_head_of_a_huge_rollout_file_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    monkeypatch.setattr(runfolder, "_parse", lambda line: parsed.append(line) or json.loads(line))
    line = (run / "rollouts/step-000010.jsonl").read_text().splitlines()[0]
    (run / "rollouts/step-000010.jsonl").write_text(f"{line}\n" * 5000)
    read_run(run)
    assert parsed.count(f"{line}\n".encode()) <= runfolder.ROLLOUTS_SCANNED + 1


def test_files_that_are_no_rollouts_are_passed_over(run: Path) -> None:
    (run / "rollouts/step-best.jsonl").write_text("not json\nnot json\n")
    assert read_run(run).rollouts


def test_runs_of_one_name_get_their_parents_in_front(tmp_path: Path) -> None:
    paths = [write_healthy_run(tmp_path / seed / "opd", steps=4) for seed in ("seed0", "seed1")]
    other = write_healthy_run(tmp_path / "sft", steps=4)
    assert [run.name for run in read_runs([*paths, other])] == ["seed0/opd", "seed1/opd", "sft"]


def test_the_same_folder_twice_is_numbered(tmp_path: Path) -> None:
    path = write_healthy_run(tmp_path / "opd", steps=4)
    assert [run.name for run in read_runs([path, path])] == ["opd", "opd (2)"]


def test_a_run_that_its_controller_stopped_says_so_unless_it_went_on():
    stop = Alert(
        rule="controller", severity="critical", signal="health/loop_token_fraction", value=0.4, threshold=0.2, step=3,
        since=2, message="Saved and stopped the run at step 3.", action="stop",
    )  # fmt: skip
    verdict = verdict_of([{"step": step} for step in range(4)], [stop])
    assert verdict.status == "warning"
    assert verdict.headline.startswith("Stopped by the controller at step 3.")
    assert verdict_of([{"step": step} for step in range(9)], [stop]).status == "unknown"
