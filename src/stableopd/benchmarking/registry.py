"""The benchmarks of the paper: where each lies on the hub, which columns it has, and how it is usually answered.

Hub ids, splits and columns are those of the datasets' own pages. Protocol: Luo et al. 2026 (arXiv 2604.08527):
temperature 0.6, 32 answers to each problem of AIME and AMC, one to those of the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stableopd.errors import DataError
from stableopd.reading import answer_text

TEMPERATURE = 0.6
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""What a problem is asked with; the usual words of mathematical benchmarks."""


def with_instruction(problem: str, instruction: str = INSTRUCTION) -> str:
    """A problem as it is asked: the same in training data and in benchmarks, for a student knows no other form."""
    return f"{problem.strip()}\n{instruction}" if instruction else problem.strip()


def plain_answer(value: Any) -> str:
    """The answer as text; a whole number that was stored as a float loses its point.

    Raises: DataError for what is no single answer: a list, an object, nothing, or a number that is not finite.
    """
    text = answer_text(value)
    if text is None:
        raise DataError(f"the answer is {value!r:.80}; it must be a text or a finite number")
    return text.strip()


def answer_behind_hashes(value: Any) -> str:
    """GSM8K's answer: what follows `####`, without commas between thousands.

    Raises: DataError when there is no `####`, or nothing behind it.
    """
    _, hashes, answer = plain_answer(value).rpartition("####")
    if not (hashes and answer.strip()):
        raise DataError(f"{str(value)[-80:]!r} has no '####' with an answer behind it, as GSM8K's solutions have")
    return re.sub(r"(?<=\d),(?=\d)", "", answer.strip())


def listed_answers(value: Any) -> str:
    """OlympiadBench's answer: one or more texts, perhaps between dollars; several are joined by commas.

    Dollars around a whole text are left off. Where one has more inside, as `$x=1$ or $x=2$`, every text stands between
    dollars: Math-Verify takes all such formulas together, and of a mixture only some.
    """
    texts = [plain_answer(one) for one in (value if isinstance(value, list | tuple) else [value])]
    bare = [re.sub(r"^(\$\$?)\s*([^$]+?)\s*\1$", r"\2", text) for text in texts]
    if any("$" in text for text in bare):
        bare = [text if "$" in text else f"${text}$" for text in bare]
    return ", ".join(bare)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkSpec:
    """One benchmark as it lies on the hub."""

    title: str
    hub_id: str
    """With a colon before the name of a configuration, where there is one."""
    split: str
    question_column: str = "problem"
    answer_column: str = "answer"
    id_column: str | None = None
    num_samples: int = 1
    """Answers to each problem in the paper: 32 is avg@32, 1 is pass@1."""
    num_problems: int
    answer_of: Callable[[Any], str] = plain_answer
    """From the answer's column to a text that Math-Verify reads."""


REGISTRY: Mapping[str, BenchmarkSpec] = {
    "math500": BenchmarkSpec(
        title="MATH-500", hub_id="HuggingFaceH4/MATH-500", split="test", id_column="unique_id", num_problems=500
    ),
    "aime24": BenchmarkSpec(
        title="AIME 2024", hub_id="HuggingFaceH4/aime_2024", split="train", id_column="id", num_samples=32,
        num_problems=30,
    ),
    "aime25": BenchmarkSpec(
        title="AIME 2025", hub_id="math-ai/aime25", split="test", id_column="id", num_samples=32, num_problems=30
    ),
    "amc": BenchmarkSpec(
        title="AMC 2023", hub_id="math-ai/amc23", split="test", question_column="question", id_column="id",
        num_samples=32, num_problems=40,
    ),
    "minerva": BenchmarkSpec(
        title="Minerva Math", hub_id="math-ai/minervamath", split="test", question_column="question", num_problems=272
    ),
    "olympiadbench": BenchmarkSpec(
        title="OlympiadBench, text-only English mathematics", hub_id="math-ai/olympiadbench", split="test",
        question_column="question", answer_column="final_answer", id_column="id", num_problems=674,
        answer_of=listed_answers,
    ),
    "gsm8k": BenchmarkSpec(
        title="GSM8K", hub_id="openai/gsm8k:main", split="test", question_column="question", num_problems=1319,
        answer_of=answer_behind_hashes,
    ),
}  # fmt: skip
ALIASES: Mapping[str, str] = {
    "math-500": "math500", "aime2024": "aime24", "aime2025": "aime25", "amc23": "amc", "minerva_math": "minerva",
    "minervamath": "minerva", "olympiad": "olympiadbench",
}  # fmt: skip


def spec_of(name: str) -> BenchmarkSpec | None:
    """The benchmark of that name or alias, in whatever case; None where the registry has none."""
    return REGISTRY.get(canonical(name))


def canonical(name: str) -> str:
    """The registry's own name for an alias; any other name as it is."""
    low = name.lower()
    return ALIASES.get(low, low if low in REGISTRY else name)
