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
print("done")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_health_runs_without_torch_transformers_or_pydantic() -> None:
    result = run(BLOCK + USE)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


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
