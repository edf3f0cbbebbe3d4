"""Imports point down only, and heavy packages stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "stableopd"

LAYERS = (
    {"errors", "types", "names", "sections", "keys", "doctor", "doctor.findings"},
    {
        "bootstrap",
        "tokens",
        "reading",
        "vocabulary",
        "lines",
        "sparklines",
        "tailing",
        "notify",
        "objective",
        "distributed",
    }
    | {"model_config", "rollout_config"}
    | {"health.causes", "health.loops", "health.pieces", "health.signals"}
    | {"losses", "losses._numerics", "losses.divergences", "losses.supports", "losses.policy", "losses.shaping"}
    | {"losses.rewards", "losses.reduction"},
    {"attention"},
    {"heads"},
    {"fused.records", "fused.chunks"},
    {"fused.checks", "fused.projection"},
    {"fused.sweep"},
    {"fused"},
    {
        "protocols",
        "health",
        "health.history",
        "health.rules",
        "health.monitor",
        "health.controller",
        "health.verdict",
        "scoring",
        "advantages",
    },
    {"health_config"},
    {"config", "runfolder", "rollout_rows", "rollout_files", "rollout_figures", "diagnosis", "diagnose"},
    {
        "config_files",
        "data",
        "drawing",
        "models",
        "optimizer",
        "judges",
        "rollout",
        "rollout.cache",
        "rollout.draws",
        "rollout.drawn",
        "rollout.loops",
        "rollout.queue",
        "rollout.slots",
        "rollout.stops",
        "rollout.hf",
        "rollout.subsets",
        "rollout.ahead",
        "rollout.snapshot",
        "rollout.source",
        "rollout.requests",
        "rollout.weight_sync",
        "rollout.vllm",
        "rollout.vllm_colocated",
        "rollout.vllm_params",
        "rollout.vllm_server",
        "teachers",
        "teachers.local",
        "teachers.offload",
        "teachers.router",
        "teachers.streams",
        "teachers.background",
        "teachers.dialects",
        "teachers.handshake",
        "teachers.retrying",
        "teachers.server",
    },
    {"rows", "probe"},
    {"terms"},
    {"benchmarking", "benchmarking.registry", "benchmarking.scores", "benchmarking.cache", "benchmarking.judge_worker"}
    | {"benchmarking.loading", "benchmarking.results", "benchmarking.timed"},
    {"metrics", "recorder", "checkpoint", "step", "evaluate", "preparation", "console", "rewards", "observation"}
    | {"diagnose_view", "watched", "watched_rollouts", "snapshot", "frames", "watch"}
    | {
        "logbook",
        "plots",
        "report",
        "report.alerts",
        "report.charts",
        "report.loops",
        "report.positions",
        "report.samples",
    }
    | {"report.settings", "report.text", "report.timeline"},
    {"benchmarking.subject", "benchmarking.view"},
    {"benchmarking.running"},
    {"teaching", "engines", "heldout"},
    {"curation", "curation.splitting", "curation.cards", "curation.overlap", "curation.plain"},
    {"curation.journal", "curation.sources", "curation.screening"},
    {"curation.sampling", "curation.openr1", "curation.parts", "curation.gold_file", "curation.gold"},
    {"curation.decontaminate"},
    {"doctor.sides", "doctor.budget", "doctor.data", "doctor.judging", "doctor.templates", "doctor.tokens"},
    {"doctor.checkup"},
    {"doctor.hardware", "doctor.shapes", "doctor.plan", "doctor.memory", "doctor.timing", "doctor.sample"},
    {"doctor.agreement"},
    {"doctor.behaviour", "doctor.estimate"},
    {"doctor.examination", "doctor.view"},
    {"assembly"},
    {"trainer"},
    {"toy", "toy.task", "toy.tokenizer", "toy.models", "toy.build", "toy.demo", "toy.making", "toy.pieces"}
    | {"toy.habits", "toy.learning", "words", "words.problems", "words.traces", "words.tokenizer", "words.judging"}
    | {"words.settings", "words.build", "words.pieces", "words.runs"},
    {"study", "study.jobs", "study.outcome", "study.layers"},
    {"study.worlds"},
    {"study.config"},
    {"study.cells"},
    {"study.final", "study.inputs"},
    {"study.made_with"},
    {"study.running"},
    {"study.table"},
    {"study.view", "study.charts"},
    {"study.report"},
    {"integrations.journal"},
    {"integrations.trl", "integrations.slime"},
    {"integrations"},
    {"commands", "commands.options"},
    {"commands.data", "commands.evaluation", "commands.study"},
    {"cli", "__main__", "__init__"},
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
WITHOUT_TORCH = (
    "health.loops",
    "health.pieces",
    "health.signals",
    "health.causes",
    "health.rules",
    "health.monitor",
    "health.controller",
    "health.verdict",
    "report",
    "report.loops",
    "report.positions",
    "report.timeline",
    "runfolder",
    "rollout_files",
    "diagnose",
    "plots",
    "integrations",
    "integrations.journal",
    "integrations.slime",
    "notify",
    "watch",
)


def modules() -> dict[str, Path]:
    names = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        names[name] = path
    return names


def imported(path: Path, *, everywhere: bool = False) -> set[str]:
    """Modules of the package that are imported when this one is (also inside functions: `everywhere`)."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stableopd":
            name = node.module.removeprefix("stableopd").lstrip(".")
            found |= {name} if name else {alias.name for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}: relative import"
    return found


def test_every_module_has_a_layer():
    assert set(modules()) == set(LEVEL)


@pytest.mark.parametrize("module", sorted(set(LEVEL) - {"__init__", "cli", "__main__"}))
def test_a_module_imports_only_from_its_own_layer_or_below(module):
    too_high = {name for name in imported(modules()[module], everywhere=True) if LEVEL[name] > LEVEL[module]}
    assert not too_high, f"{module} (layer {LEVEL[module]}) imports {too_high} from above"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_reads_and_watches_runs_without_torch(module):
    code = f"import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; import stableopd.{module}"
    subprocess.run([sys.executable, "-c", code], check=True)
