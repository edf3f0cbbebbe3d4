"""What a run reads, as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stableopd.drawing import GoldPool, PromptStream
from stableopd.preparation import RunData
from stableopd.types import Example

ROWS = tuple(
    Example(index=row, prompt="", prompt_ids=(row, 5), gold_ids=(7, 2), gold_weights=(1.0, 0.5), answer="3")
    for row in range(3)
)


def digest(rows: tuple[Example, ...], pool: tuple[Example, ...] = ()) -> str:
    stream = PromptStream(rows, num_prompts=1, seed=0)
    return RunData(stream=stream, gold_pool=GoldPool(pool, seed=0) if pool else None, held_out=[]).digest()


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_ids": (1, 5, 7), "gold_ids": (2,)},
        {"gold_ids": (7, 3)},
        {"gold_ids": None},
        {"gold_weights": None},
        {"gold_weights": (1.0, 0.25)},
        {"answer": "4"},
        {"answer": None},
    ],
)
def test_the_digest_of_a_runs_data_notices_every_column_that_training_reads(change: dict[str, object]) -> None:
    changed = (ROWS[0], replace(ROWS[1], **change), ROWS[2])
    assert digest(changed) != digest(ROWS)
    if changed[1].gold_ids:
        assert digest(ROWS, changed) != digest(ROWS, ROWS)


def test_the_digest_of_a_runs_data_notices_the_gold_pool_and_the_order() -> None:
    found = [digest(ROWS), digest(ROWS[::-1]), digest(ROWS, ROWS), digest((*ROWS, ROWS[0])), digest(ROWS, ROWS[:1])]
    assert len(set(found)) == len(found)
    assert digest(tuple(replace(row) for row in ROWS)) == digest(ROWS)
