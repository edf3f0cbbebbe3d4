"""Health works where neither torch nor transformers nor pydantic can be imported."""

from __future__ import annotations

import subprocess
import sys

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "pydantic"}:
            raise ImportError(f"blocked: {name}")

sys.meta_path.insert(0, Block())
"""

USE = """
import stableopd
from stableopd.health import HealthMonitor, compression_ratio, judge_run, loop_mask

assert stableopd.__version__
assert stableopd.HealthMonitor is HealthMonitor
assert tuple(stableopd.check_sequence_length([[1, 2], [3]], 5)) == (1.5, 2)
assert set(stableopd.__all__) <= set(dir(stableopd))
report = HealthMonitor().observe(
    1, lengths=[18], finish_reasons=["stop"], texts=["abcabc" * 3], token_ids=[[1, 2, 3] * 6], advantages=[[0.1] * 18]
)
assert report.metrics["health/loop_token_fraction"] == 1.0
assert judge_run([]).status == "unknown"
import stableopd.cli, stableopd.watch
from stableopd.notify import Notifier
Notifier("run", command=["true"]).close()

import tempfile
from pathlib import Path
from stableopd.diagnose import diagnose

with tempfile.TemporaryDirectory() as folder:
    Path(folder, "a.jsonl").write_text('{"text": "' + "so again " * 40 + '"}')
    assert not diagnose([folder])[0].healthy
print("done")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_health_runs_without_torch_transformers_or_pydantic() -> None:
    result = run(BLOCK + USE)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


def test_the_hook_for_slime_runs_with_numpy_alone() -> None:
    code = """
from types import SimpleNamespace
from stableopd.integrations import RolloutLog
sample = SimpleNamespace(tokens=[9, 1, 2], response_length=2, response="ab", status="completed", reward=1.0)
metrics = {}
assert RolloutLog().log_rollout_data(0, SimpleNamespace(), [sample], metrics, 1.0) is False
assert metrics["completions/mean_length"] == 2.0
print("done")
"""
    result = run(BLOCK.replace('"pydantic"', '"pydantic", "yaml", "accelerate", "slime"') + code)
    assert result.stdout == "done\n", result.stderr


def test_the_callback_for_trl_loads_neither_trl_nor_anything_of_our_trainer() -> None:
    # transformers itself looks for many packages, so they cannot be blocked here.
    code = """
import sys
from stableopd.integrations import HealthCallback
HealthCallback()
print({"pydantic", "typer", "plotly", "matplotlib", "trl", "datasets"} & set(sys.modules))
print(sorted({name.split(".")[1] for name in sys.modules if name.startswith("stableopd.")}))
"""
    assert run(code).stdout == "set()\n['errors', 'health', 'integrations', 'lines', 'types']\n"


def test_the_block_really_blocks() -> None:
    result = run(BLOCK + "import torch")
    assert "blocked: torch" in result.stderr


def test_importing_the_package_loads_none_of_them() -> None:
    code = "import sys, stableopd, stableopd.health; print({'torch', 'transformers', 'pydantic'} & set(sys.modules))"
    assert run(code).stdout == "set()\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert (
        "AttributeError: module 'stableopd' has no attribute 'nope'" in run("import stableopd; stableopd.nope").stderr
    )
