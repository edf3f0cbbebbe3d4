"""What became of a run of a study: figures, curves and answers prompt by prompt, small enough to keep for all runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from stableopd.benchmarking.results import EvalResult
from stableopd.errors import RunFolderError
from stableopd.health.verdict import collapse_step, collapsed_at_end
from stableopd.lines import append_line, write_atomically
from stableopd.runfolder import RunRecord, read_run

CURVES: Mapping[str, str] = {
    "accuracy": "eval/{name}/accuracy",
    "greedy_accuracy": "eval/{name}_greedy/accuracy",
    "greedy_truncation": "eval/{name}_greedy/truncation_rate",
    "truncation": "completions/clipped_ratio",
    "length": "completions/mean_length",
    "repeated": "health/repeated_token_fraction",
    "stop_probe": "health/stop_probe",
}
Share = Annotated[float, Field(ge=0.0, le=1.0)]
MAX_POINTS = 100
"""Points kept of each curve but the accuracy's, whose last part is a result of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One finished run. A line of results.jsonl, from which the study's report is made."""

    arm: str
    pair: str
    seed: int
    digest: str
    """Of the run's settings."""
    figures: Mapping[str, float]
    verdict: str
    headline: str
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    answers: Mapping[str, Annotated[Sequence[Share], Field(min_length=1)]] = field(default_factory=dict)
    """By benchmark the share of right answers to each of its prompts, in its order."""
    benchmarks: Mapping[str, str] = field(default_factory=dict)
    """Digest of each benchmark's prompts: answers are paired only where it is the same."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Digest of each file of prompts that the run read, by its setting."""
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """What `digest` is of, so that a change can be named; where it is left out, only that there is one."""
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.arm, self.pair, self.seed

    def with_late(self, fraction: float) -> Outcome:
        """With the late accuracy: the mean of the evaluations in the last part of the run."""
        accuracy = self.curves.get("accuracy", ())
        if not accuracy:
            return self
        last = accuracy[-1][0]
        late = [value for step, value in accuracy if step > last * (1 - fraction) or step == last]
        return replace(self, figures={**self.figures, "late_accuracy": fmean(late)})


_LINE = TypeAdapter(Outcome)


def outcome_of_run(run: RunRecord, name: str) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Figures and curves of a run folder, `name` being its held-out set."""
    curves = {key: run.values(metric.format(name=name)) for key, metric in CURVES.items()}
    accuracy = curves["accuracy"]
    figures: dict[str, float] = {}
    if accuracy:
        figures["start_accuracy"] = accuracy[0][1]
        figures["best_accuracy"] = max(value for _, value in accuracy)
        figures["end_accuracy"] = accuracy[-1][1]
    for figure, curve in (
        ("greedy_accuracy", "greedy_accuracy"),
        ("greedy_truncation", "greedy_truncation"),
        ("end_length", "length"),
    ):
        if curves[curve]:
            figures[figure] = curves[curve][-1][1]
    for figure, curve in (("worst_truncation", "truncation"), ("worst_repeated", "repeated")):
        if curves[curve]:
            figures[figure] = max(value for _, value in curves[curve])
    collapsed = collapse_step(run.metrics, name)
    figures["collapsed"] = float(collapsed is not None)
    figures["collapsed_at_end"] = float(collapsed_at_end(run.metrics, name))
    if collapsed is not None:
        figures["collapse_step"] = float(collapsed)
    figures["critical_alerts"] = float(sum(alert.severity == "critical" for alert in run.alerts))
    figures["actions"] = float(sum(alert.rule == "controller" for alert in run.alerts))
    figures["steps"] = float(run.last_step or 0)
    figures["num_tokens"] = max((value for _, value in run.values("num_tokens")), default=0.0)
    figures["step_time_s"] = sum(value for _, value in run.values("step_time"))
    kept = {key: _thinned(curve, None if key == "accuracy" else MAX_POINTS) for key, curve in curves.items() if curve}
    return {name: value for name, value in figures.items() if math.isfinite(value)}, kept


def _thinned(points: Sequence[tuple[int, float]], most: int | None) -> list[tuple[int, float]]:
    stride = math.ceil(len(points) / (most or len(points)))
    kept = [*points[::stride]]
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return [(step, round(value, 5)) for step, value in kept]


def read_folder(folder: Path, *, arm: str, pair: str, seed: int, digest: str, name: str) -> Outcome:
    """The outcome of a finished run folder, without the answers to the final benchmark."""
    run = read_run(folder)
    figures, curves = outcome_of_run(run, name)
    return Outcome(
        arm=arm, pair=pair, seed=seed, digest=digest, figures=figures, curves=curves,
        verdict=run.verdict.status, headline=run.verdict.headline,
    )  # fmt: skip


def with_answers(outcome: Outcome, path: Path) -> Outcome:
    """The outcome with the answers of a stored evaluation: those that were sampled, and figures of the greedy ones.

    Raises: RunFolderError for a file that holds no evaluation.
    """
    try:
        results = [EvalResult.from_json(record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} holds no answers of an evaluation: {error}") from error
    sampled = [result for result in results if result.settings.temperature]
    greedy = [result for result in results if not result.settings.temperature]
    figures = dict(outcome.figures)
    for name, of_kind in (("final", sampled), ("final_greedy", greedy)):
        if of_kind:
            figures[f"{name}_accuracy"] = fmean(result.accuracy.value for result in of_kind)
            figures[f"{name}_truncation"] = fmean(result.figures["truncated_fraction"].value for result in of_kind)
            figures[f"{name}_length"] = fmean(result.figures["length"].value for result in of_kind)
    unjudged = sum(result.failures(kind) for result in results for kind in ("timeout", "error"))
    figures["judge_failures"] = float(unjudged)
    chosen = sampled or greedy
    return replace(
        outcome,
        figures=figures,
        answers={result.benchmark: [prompt.accuracy for prompt in result.prompts] for result in chosen},
        benchmarks={result.benchmark: result.benchmark_digest for result in chosen},
    )


def read_outcomes(path: Path) -> list[Outcome]:
    """The lines of a results file; of a run that is there twice, the later one. No file: none.

    Raises: RunFolderError for a broken line that is not the last.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.split("\n") if line.strip()]
    found: dict[tuple[str, str, int], Outcome] = {}
    for number, line in enumerate(lines, start=1):
        try:
            outcome = _LINE.validate_json(line)
        except ValidationError as error:
            if number == len(lines) and not text.endswith("\n"):
                continue  # torn by a kill; the run is collected again
            first = error.errors()[0]
            why = ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
            raise RunFolderError(f"{path}, line {number} is no result of a run: {why}. Mend or delete it") from None
        found[outcome.key] = outcome
    return list(found.values())


def append_outcome(path: Path, outcome: Outcome) -> None:
    """Add one result to a results file, on a line of its own even behind one that a kill has torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        whole, newline, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        write_atomically(path, whole + newline)
    append_line(path, asdict(outcome))


def by_arm(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    grouped: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault(outcome.arm, []).append(outcome)
    return grouped
