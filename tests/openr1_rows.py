"""Rows in the schema of OpenR1-Math-220k: one for each thing that may happen to a row or a generation."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("problem", "solution", "answer", "problem_type", "question_type", "source")),
        ("uuid", pa.string()),
        ("is_reasoning_complete", pa.list_(pa.bool_())),
        ("generations", pa.list_(pa.string())),
        ("correctness_math_verify", pa.list_(pa.bool_())),
        ("correctness_llama", pa.list_(pa.bool_())),
        ("finish_reasons", pa.list_(pa.string())),
        ("correctness_count", pa.int64()),
        ("messages", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
    ]
)


def row(
    problem: str | None,
    *generations: str,
    answer: str | None = "7",
    right: list[bool] | None = None,
    complete: list[bool] | None = None,
    finish_reasons: list[str] | None = None,
    uuid: str | None = None,
) -> dict[str, Any]:
    number = len(generations)
    return {
        "problem": problem,
        "solution": "As the reader sees.",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": uuid or f"id of {problem}",
        "is_reasoning_complete": [True] * number if complete is None else complete,
        "generations": list(generations),
        "correctness_math_verify": [True] * number if right is None else right,
        "correctness_llama": None,
        "finish_reasons": finish_reasons,
        "correctness_count": number,
        "messages": [{"role": "user", "content": problem}, {"role": "assistant", "content": "…"}],
    }


def rows_of_each_kind() -> list[dict[str, Any]]:
    """With at most 60 tokens (characters), the last 40 characters and a compression above 3 in view."""
    return [
        row("two that fit", "12+13+14", "1+2", finish_reasons=["stop", "stop"]),
        row("a wrong one and a right one", "1+1=3", "1+1=2:9+9+", right=[False, True]),
        row("incomplete", "1+1", complete=[False]),
        row("truncated", "1+1", finish_reasons=["length"]),
        row("too long", "0123456789" * 7),
        row("repetitive", "1" * 60),
        row("wrong", "1+1=3", "1+1=4", right=[False, False]),
        row("blank", "  "),
        row("without generations"),
        row(None, "1+1"),
        row("  ", "1+1"),
        row("two  that\nfit", "2+2"),  # the first prompt again, but for white space
        row("without an answer", "5+5", answer=None),
        row("not judged", "5+5", right=[]),
        row("not to be encoded", "5 × 5"),
    ]


def many_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    rows = []
    for index in range(number):
        texts = [str(chance.randrange(10 ** chance.randrange(1, 30))) for _ in range(chance.randrange(1, 4))]
        right = [chance.random() < 0.7 for _ in texts]
        rows.append(row(f"problem {chance.randrange(number)}", *texts, right=right, uuid=f"id {index}"))
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]], rows_per_group: int = 5) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=rows_per_group)
    return path


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """A printable ASCII character is a token; any other cannot be encoded."""
    vocabulary = {character: index for index, character in enumerate(map(chr, range(32, 127)))}
    backend = Tokenizer(models.WordLevel({**vocabulary, "<end>": len(vocabulary)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def killed_at(work: Callable[[], object], number: int) -> bool:
    """Runs `work` in a process that is killed at its `number`-th file operation; whether it got to its end before."""
    child = os.fork()
    if child == 0:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not there after a fork
        left = iter(range(number - 1, -1, -1))

        def deadly(operation: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **named: Any) -> Any:
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*arguments, **named)

            return wrapped

        for owner, name in ((os, "fsync"), (os, "truncate"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree")):
            setattr(owner, name, deadly(getattr(owner, name)))
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


def killed_until_done(work: Callable[[], object]) -> int:
    """Kills `work` at its first file operation, its second, ..., each time going on; returns the number of kills."""
    for number in range(1, 1000):
        if killed_at(work, number):
            return number - 1
    raise AssertionError("never gets to its end")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
