"""The words of the report: what happened, why, and what helped, from verdicts, figures and configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from stableopd.report.alerts import QUIET
from stableopd.report.charts import accuracy_key, main_evaluation
from stableopd.report.settings import differences, method
from stableopd.runfolder import RunRecord

MISSING = "–"
BADGES = {"healthy": "✓ healthy", "warning": "! warning", "collapsed": "✕ collapsed", "unknown": "? unknown"}
MAX_NAMED_RUNS = 3
"""Up to so many runs get a clause each in the headline; more are counted."""
SMALL = 0.02
"""A loss of accuracy below this is not worth a number."""
MAX_SETTINGS = 5
"""Differing settings named in a sentence."""
LARGE = 0.3
"""Truncation above this is named as part of what happened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The figures of one run that a verdict is about; None where nothing was measured."""

    first: float | None
    best: float | None
    best_step: int | None
    final: float | None
    greedy_truncation: float | None
    repetition: float | None


def outcome(run: RunRecord, runs: Sequence[RunRecord]) -> Outcome:
    """Held-out accuracy and greedy truncation on the set that the runs share, and repetition in training."""
    name = main_evaluation(runs)
    accuracy = run.values(accuracy_key(runs, name)) if name else []
    best = max(accuracy, key=lambda point: point[1], default=(None, None))
    return Outcome(
        first=accuracy[0][1] if accuracy else None,
        best=best[1],
        best_step=best[0],
        final=accuracy[-1][1] if accuracy else None,
        greedy_truncation=_last(run, f"eval/{name}_greedy/truncation_rate"),
        repetition=_last(run, "health/repetition_rate"),
    )


def _last(run: RunRecord, key: str) -> float | None:
    return run.values(key)[-1][1] if run.values(key) else None


# ------------------------------------------------------------------------------------ headline


_TROUBLE_FIRST = ("collapsed", "warning", "healthy", "unknown")


def headline(runs: Sequence[RunRecord]) -> str:
    """What happened, in one sentence: the runs that collapsed first."""
    ranked = sorted(runs, key=lambda run: _TROUBLE_FIRST.index(run.verdict.status))
    if len(runs) > MAX_NAMED_RUNS:
        return _counted(ranked)
    beside_trouble = ranked[0].verdict.status in ("collapsed", "warning")
    return "; ".join(_clause(run, outcome(run, runs), beside_trouble) for run in ranked) + "."


def _clause(run: RunRecord, result: Outcome, beside_trouble: bool) -> str:
    match run.verdict.status:
        case "collapsed":
            return f"{run.name} {_fall(run, result)}"
        case "warning":
            return f"{run.name}: {_verdict(run)}"
        case "healthy" if result.final is None:
            return f"{run.name} stayed healthy"
        case "healthy" if beside_trouble:
            return f"{run.name} held at {result.final:.2f}"
        case "healthy":
            return f"{run.name} stayed healthy: held-out accuracy {result.first:.2f} → {result.final:.2f}"
        case _:
            return f"{run.name} has too little data for a verdict"


def _fall(run: RunRecord, result: Outcome) -> str:
    if result.best is None or result.final is None or result.best - result.final < SMALL:
        return _verdict(run)
    lengths = result.greedy_truncation is not None and result.greedy_truncation > LARGE
    why = " while greedy answers ran into the length limit" if lengths else ""
    drop = f"held-out accuracy fell from {result.best:.2f} to {result.final:.2f}"
    return f"collapsed at step {run.verdict.step}: {drop}{why}"


def _verdict(run: RunRecord) -> str:
    """The verdict's own headline, to go on with after a name."""
    text = run.verdict.headline.rstrip(".")
    return text[:1].lower() + text[1:]


def _counted(runs: Sequence[RunRecord]) -> str:
    """Many runs by method: how many collapsed, and where held-out accuracy ended on average."""
    methods: dict[str, list[RunRecord]] = {}
    for run in runs:
        methods.setdefault(str(run.config.get("method", "unnamed")), []).append(run)
    shares = ", ".join(f"{name} {_collapsed(members)} of {len(members)}" for name, members in methods.items())
    endings = [
        f"{name} {mean(finals):.2f}"
        for name, members in methods.items()
        if (finals := [final for run in members if (final := outcome(run, runs).final) is not None])
    ]
    accuracy = f" Held-out accuracy at the end, on average: {', '.join(endings)}." if endings else ""
    return f"{_collapsed(runs)} of {len(runs)} runs collapsed: {shares}.{accuracy}"


def _collapsed(runs: Sequence[RunRecord]) -> int:
    return sum(run.verdict.status == "collapsed" for run in runs)


# ------------------------------------------------------------------------------------ why, and what helped


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    question: str
    text: str


def answers(runs: Sequence[RunRecord]) -> list[Answer]:
    """Why it went wrong, where it did, and what helped or is worth trying."""
    found = {"Why": why(runs), _remedy_question(runs): remedy(runs)}
    return [Answer(question=question, text=text) for question, text in found.items() if text]


def _remedy_question(runs: Sequence[RunRecord]) -> str:
    statuses = {run.verdict.status for run in runs}
    if "collapsed" not in statuses:
        return "In short"
    return "What helped" if "healthy" in statuses else "What to try"


def why(runs: Sequence[RunRecord]) -> str | None:
    """Why the first troubled run went wrong; None when none did."""
    run = next((run for status in ("collapsed", "warning") for run in runs if run.verdict.status == status), None)
    if run is None:
        return None
    return _mechanism(run) or " ".join(run.verdict.reasons) or run.verdict.headline


def _mechanism(run: RunRecord) -> str | None:
    """Why repetition pays, told in this run's figures; None when they were not logged or say otherwise."""
    for name, rest, what in (("repeated", "fresh", "repeated tokens"), ("loop", "other", "tokens in loops")):
        share = run.values(f"health/{name}_token_fraction")
        inside = dict(run.values(f"health/advantage_{name}"))
        outside = dict(run.values(f"health/advantage_{rest}"))
        if not share or not (shared := inside.keys() & outside.keys()):
            continue
        step, peak = max(share, key=lambda point: point[1])
        step = min(shared, key=lambda other: abs(other - step))
        if peak < 2 * share[0][1] or inside[step] <= outside[step]:
            continue
        better = f"mean advantage {_signed(inside[step])} against {_signed(outside[step])} at step {step}"
        return (
            f"In the rollouts of {run.name}, {what} went from {share[0][1]:.1%} to {peak:.0%} of all tokens. "
            f"They are easy to predict, so the teacher faults them less than the rest ({better}): "
            "repeating pays, and the more rollouts repeat, the larger its share of the update."
        )
    return None


def remedy(runs: Sequence[RunRecord]) -> str:
    """How a healthy run differs from a collapsed one, for the pair that differs least; or what to try next."""
    collapsed = [run for run in runs if run.verdict.status == "collapsed"]
    healthy = [run for run in runs if run.verdict.status == "healthy"]
    if not collapsed:
        return _without_collapse(runs)
    if not healthy:
        return (
            "No run here stayed healthy. The usual remedy: golden solutions in every batch "
            "(objective.gold.coef) and a pull towards the initial student (objective.reference.coef)."
        )
    pairs = [(bad, good) for bad in collapsed for good in healthy]
    bad, good = min(pairs, key=lambda pair: (len(differences(pair)), -(outcome(pair[1], runs).final or 0.0)))
    changed = [f"{row.key} {row.values[0]} → {row.values[1]}" for row in differences((bad, good))]
    settings = ", ".join(changed[:MAX_SETTINGS]) or "nothing but chance"
    more = f" and {len(changed) - MAX_SETTINGS} more" if len(changed) > MAX_SETTINGS else ""
    acted = [alert for alert in good.alerts if alert.action not in QUIET]
    if not acted:
        return f"{good.name} stayed healthy. Against {bad.name} it changes: {settings}{more}."
    changes = f" Against {bad.name} it changes: {settings}{more}." if changed else ""
    times = "once" if len(acted) == 1 else f"{len(acted)} times"
    return (
        f"{good.name} stayed healthy: its controller acted {times}, first at step {acted[0].step} "
        f"({acted[0].action[:40]}).{changes}"
    )


def _without_collapse(runs: Sequence[RunRecord]) -> str:
    statuses = {run.verdict.status for run in runs}
    if statuses == {"unknown"}:
        return "Nothing can be said yet. A verdict takes two evaluations, or a few more steps of training."
    if "warning" in statuses:
        return "Nothing is lost yet. Look at the alerts and at greedy truncation before the run goes on."
    return "Nothing collapsed here. Keep an eye on greedy truncation: it moves first."


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


# ------------------------------------------------------------------------------------ cards


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A run at a glance, ready to print."""

    number: int
    name: str
    status: str
    badge: str
    method: str
    reasons: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]


def cards(runs: Sequence[RunRecord]) -> list[Card]:
    """One card a run; of more than two, the troubled ones come first."""
    made = [(run, _card(number, run, outcome(run, runs))) for number, run in enumerate(runs)]
    if len(made) > 2:
        made.sort(key=lambda pair: _TROUBLE_FIRST.index(pair[0].verdict.status))
    return [card for _, card in made]


def _card(number: int, run: RunRecord, result: Outcome) -> Card:
    accuracy = MISSING
    if result.best is not None and result.final is not None:
        accuracy = f"{result.best:.2f} (step {result.best_step}) → {result.final:.2f}"
    return Card(
        number=number,
        name=run.name,
        status=run.verdict.status,
        badge=BADGES[run.verdict.status] + (f", step {run.verdict.step}" if run.verdict.step is not None else ""),
        method=method(run.config),
        reasons=run.verdict.reasons,
        facts=(
            ("accuracy, best → final", accuracy),
            ("greedy answers cut off", percent(result.greedy_truncation)),
            ("repetitive training rollouts", percent(result.repetition)),
        ),
    )


def percent(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"
