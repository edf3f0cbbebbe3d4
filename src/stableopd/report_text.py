"""The words of the report: what happened, why, and what helped, from verdicts, figures and configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stableopd.report_charts import accuracy_key, main_evaluation
from stableopd.runfolder import RunRecord

MISSING = "–"
BADGES = {"healthy": "✓ healthy", "warning": "! warning", "collapsed": "✕ collapsed", "unknown": "? unknown"}
MAX_NAMED_RUNS = 3
"""Up to so many runs get a clause each in the headline; more are counted."""
SMALL = 0.02
"""A loss of accuracy below this is not worth a number."""
LARGE = 0.3
"""Truncation above this is named as part of what happened."""
ALIASES = {"objective.gold.coef": "lambda_gold", "objective.reference.coef": "beta_kl"}
NOT_COMPARED = ("output_dir", "logging", "run_name")
"""Settings that differ between any two runs and change nothing in them."""


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


def headline(runs: Sequence[RunRecord]) -> str:
    """What happened, in one sentence: the runs that collapsed first."""
    order = ("collapsed", "warning", "healthy", "unknown")
    ranked = sorted(runs, key=lambda run: order.index(run.verdict.status))
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


def _counted(ranked: Sequence[RunRecord]) -> str:
    groups: dict[str, list[RunRecord]] = {}
    for run in ranked:
        groups.setdefault(run.verdict.status, []).append(run)
    parts = []
    for status, members in groups.items():
        finals = sorted(x for run in members if (x := outcome(run, ranked).final) is not None)
        accuracy = f" (held-out accuracy {finals[0]:.2f}–{finals[-1]:.2f} at the end)" if finals else ""
        parts.append(f"{len(members)} {status}{accuracy}")
    return f"Of {len(ranked)} runs: {', '.join(parts)}."


# ------------------------------------------------------------------------------------ why, and what helped


def why(runs: Sequence[RunRecord]) -> str | None:
    """Why the first troubled run went wrong; None when none did."""
    run = next((run for status in ("collapsed", "warning") for run in runs if run.verdict.status == status), None)
    if run is None:
        return None
    return _mechanism(run) or " ".join(map(_sentence, run.verdict.reasons)) or _sentence(run.verdict.headline)


def _mechanism(run: RunRecord) -> str | None:
    """The loop that feeds itself, told in this run's figures; None when they were not logged or say otherwise."""
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
        return (
            f"In the rollouts of {run.name}, {what} went from {share[0][1]:.1%} to {peak:.0%} of all tokens. The teacher "
            f"rated them better than the rest (mean advantage {_signed(inside[step])} against {_signed(outside[step])} at "
            f"step {step}), so each update made repetition likelier: a loop that feeds itself."
        )
    return None


def what_helped(runs: Sequence[RunRecord]) -> str:
    """Settings in which the best healthy run differs from the collapsed one, or what to try when there is no such pair."""
    collapsed = [run for run in runs if run.verdict.status == "collapsed"]
    healthy = [run for run in runs if run.verdict.status == "healthy"]
    if not collapsed:
        return "Nothing collapsed here. Keep an eye on greedy truncation: it moves first."
    if not healthy:
        return (
            "No run here stayed healthy. The usual remedy: golden solutions in every batch "
            "(objective.gold.coef) and a pull towards the initial student (objective.reference.coef)."
        )
    best = max(healthy, key=lambda run: outcome(run, runs).final or 0.0)
    changed = [row for row in differences([collapsed[0], best]) if row.key != "seed"]
    settings = ", ".join(f"{row.key} {row.values[0]} → {row.values[1]}" for row in changed[:5])
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    return f"{best.name} stayed healthy. Against {collapsed[0].name} it changes: {settings or 'nothing but chance'}{more}."


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


# ------------------------------------------------------------------------------------ cards and settings


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
    return [_card(number, run, outcome(run, runs)) for number, run in enumerate(runs)]


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
        reasons=tuple(map(_sentence, run.verdict.reasons)),
        facts=(
            ("held-out accuracy, best → final", accuracy),
            ("greedy answers cut off", percent(result.greedy_truncation)),
            ("repetitive training rollouts", percent(result.repetition)),
        ),
    )


def method(config: Mapping[str, Any]) -> str:
    """Method and coefficients: `stableopd · distill 1 · gold 1 · reference 0.1`."""
    flat = flatten(config)
    terms = [str(flat.get("method", "method unknown"))]
    for term in ("distill", "gold", "reference", "reward"):
        key = f"objective.{term}.coef"
        coef = flat.get(key, flat.get(ALIASES.get(key, key)))
        if coef is not None:
            terms.append(f"{term} {show(coef)}")
    return " · ".join(terms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A setting, and its value in each run."""

    key: str
    values: tuple[str, ...]


def differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """Settings that are not the same in all runs, by dotted key."""
    flats = [flatten(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for flat in flats for key in flat):
        values = tuple(show(flat[key]) if key in flat else "(unset)" for flat in flats)
        if len(set(values)) > 1 and not key.startswith(NOT_COMPARED):
            rows.append(Difference(key=key, values=values))
    return rows


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted key."""
    return dict(_leaves(config, ""))


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def show(value: Any) -> str:
    """A setting as one would write it: 1 for 1.0, true for True, none for None."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def percent(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"
