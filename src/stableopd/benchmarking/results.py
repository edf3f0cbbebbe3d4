"""What an evaluation was made with and what came out, prompt by prompt; and its figures with intervals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stableopd.benchmarking.scores import ks_up_to, majority_at_k, pass_at_k
from stableopd.bootstrap import mean_of_answers


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """How a model answers a benchmark. Stored with every result."""

    model: str
    benchmark: str
    revision: str | None = None
    num_samples: int = 1
    temperature: float = 0.6
    """0 is greedy decoding."""
    top_p: float = 1.0
    top_k: int = 0
    max_completion_length: int | None = None
    """Longest answer in tokens; None: what the model's context leaves beside the longest question, 4,096 at most."""
    seed: int = 0
    judge: str = "exact"
    judge_timeout_s: float = 10.0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    chat: bool = True
    """Questions that are text are put into the chat template, where the tokenizer has one."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    stop_strings: tuple[str, ...] = ()
    """An answer also ends when its text holds one of these; the tokens that make it up stay."""
    stop_token_ids: tuple[int, ...] = ()
    """More ids that end an answer, beside those of tokenizer, chat template and generation_config.json."""
    split: str | None = None
    """Of a benchmark of one's own that is a folder or a dataset on the hub."""
    num_problems: int | None = None
    question_column: str | None = None
    answer_column: str | None = None
    tail_chars: int = 10_000
    compression_threshold: float = 10.0
    batch_size: int = 64
    """Answers generated at a time; changes nothing in them."""
    device: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptResult:
    """The answers to one question."""

    id: str
    answer: str
    right: Sequence[bool]
    votes: Sequence[str | None]
    lengths: Sequence[int]
    """Tokens of each answer, the end token included."""
    finish_reasons: Sequence[str]
    repetitive: Sequence[bool]
    failures: Sequence[str | None]
    """`timeout` or `error` for each answer that could not be judged, which counts as wrong."""

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.right)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A mean over questions with its bootstrap interval (95%, over questions)."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """A finished evaluation."""

    settings: EvalSettings
    benchmark: str
    benchmark_digest: str
    """Of questions and answers: results are comparable where it is the same."""
    weights_digest: str
    version: str
    prompts: Sequence[PromptResult]
    num_tokens: int
    generation_s: float
    """Seconds of generation in the session that finished it; 0 where all answers were there already."""
    failure_message: str = ""
    """What was the matter with the first answer that could not be judged."""

    @property
    def figures(self) -> dict[str, Figure]:
        """`avg@k`, `pass@1..k`, `maj@k` and what tells of health, each a mean over questions."""
        k = self.settings.num_samples
        found = {f"avg@{k}" if k > 1 else "accuracy": self._mean(lambda prompt: prompt.accuracy)}
        if k > 1:
            for size in ks_up_to(k)[1:]:
                found[f"pass@{size}"] = self._mean(lambda p, size=size: pass_at_k(k, sum(p.right), size))  # type: ignore[misc]
            found[f"maj@{k}"] = self._mean(lambda prompt: majority_at_k(prompt.votes, prompt.right))
        found["length"] = self._mean(lambda prompt: statistics.fmean(prompt.lengths))
        found["truncated_fraction"] = self._mean(lambda prompt: _share(prompt.finish_reasons, "length"))
        found["repetition_rate"] = self._mean(lambda prompt: statistics.fmean(prompt.repetitive))
        return found

    @property
    def accuracy(self) -> Figure:
        """The first figure: avg@k, or plain accuracy of one answer each."""
        return next(iter(self.figures.values()))

    @property
    def max_length(self) -> int:
        return max(length for prompt in self.prompts for length in prompt.lengths)

    @property
    def is_judged(self) -> bool:
        """Whether there is a verdict on any answer; where there is none, figures of right answers say nothing."""
        return any(failure is None for prompt in self.prompts for failure in prompt.failures)

    def failures(self, kind: str) -> int:
        """Answers that could not be judged: `timeout` or `error`."""
        return sum(failure == kind for prompt in self.prompts for failure in prompt.failures)

    def _mean(self, of_prompt: Callable[[PromptResult], float]) -> Figure:
        found = mean_of_answers({"": [[float(of_prompt(prompt)) for prompt in self.prompts]]})
        return Figure(value=found.mean, low=found.low, high=found.high)

    def to_json(self) -> dict[str, Any]:
        """Figures first, for whoever opens the file."""
        figures = {name: asdict(figure) for name, figure in self.figures.items()}
        judged = {"timeouts": self.failures("timeout"), "errors": self.failures("error")}
        return {"figures": figures, "max_length": self.max_length, "judge": judged, **asdict(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> EvalResult:
        """Raises: KeyError or TypeError for a record of something else."""
        own = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        stops = {name: tuple(own["settings"].get(name, ())) for name in ("stop_strings", "stop_token_ids")}
        own["settings"] = EvalSettings(**{**own["settings"], **stops})
        own["prompts"] = [PromptResult(**prompt) for prompt in own["prompts"]]
        return cls(**own)

    def dump(self) -> str:
        return json.dumps(self.to_json(), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _share(values: Sequence[str], wanted: str) -> float:
    return sum(value == wanted for value in values) / len(values)
