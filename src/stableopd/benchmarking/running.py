"""Asks a model the questions of a benchmark, judges its answers, and keeps both."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import stableopd
from stableopd.benchmarking.cache import Answer, AnswerStore, key_of
from stableopd.benchmarking.loading import Benchmark, Problem, load_benchmark
from stableopd.benchmarking.results import EvalResult, EvalSettings, PromptResult
from stableopd.benchmarking.subject import Subject, load_subject
from stableopd.benchmarking.timed import Judged, TimedJudge
from stableopd.data import load_examples
from stableopd.errors import ConfigError
from stableopd.evaluate import decode
from stableopd.health.signals import repetition_rate
from stableopd.lines import write_atomically
from stableopd.recorder import lock_folder
from stableopd.rollout.hf import HFEngine
from stableopd.types import Example, Sampling
from stableopd.vocabulary import pad_token_id, vocab_size

DEFAULT_LONGEST = 4_096
"""Longest answer where none is asked for and the model's context has room, in tokens."""
Progress = Callable[[str, int, int], None]
"""(what is being done, done so far, in all)"""


def evaluate_model(
    settings: EvalSettings,
    out: Path,
    progress: Progress = lambda what, done, total: None,
    *,
    subject: Subject | None = None,
) -> EvalResult:
    """The result of a model on a benchmark, from the cache under `out` as far as it is there.

    Answers are kept by weights, prompts and sampling: what was generated is never generated again, another judge or
    fewer samples take the same answers, and an evaluation that was killed goes on where it was. An answer depends on
    (seed, number of the question, number of the answer) alone. A folder of answers has one writer at a time.

    Args: `subject` is the model of these settings where it is loaded already.

    Raises: ConfigError, DataError or ModelError when it cannot be made; RunFolderError while another process makes it.
    """
    benchmark = load_benchmark(
        settings.benchmark,
        split=settings.split,
        question_column=settings.question_column,
        answer_column=settings.answer_column,
        num_problems=settings.num_problems,
    )
    with TimedJudge(
        settings.judge, timeout_s=settings.judge_timeout_s, num_workers=min(4, os.cpu_count() or 1), setting="--judge"
    ) as judge:
        judge.start()  # one that cannot be had is told before hours of answers
        progress("loading the model", 0, 1)
        subject = subject or load_subject(settings)
        examples = _examples(benchmark, settings, subject)
        longest = _longest_answer(settings, subject, examples)
        settings = replace(settings, max_completion_length=longest)
        folder = out / _folder_name(settings, benchmark, subject, examples)
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder):  # one that mends a torn last line would lose what another writes meanwhile
            result = _result(
                benchmark,
                settings,
                subject,
                examples,
                AnswerStore(folder, longest),
                judge,
                progress,
            )
            name = f"result-{settings.num_samples}-{key_of({'judge': settings.judge})}.json"
            write_atomically(folder / name, result.dump())
    return result


def _result(
    benchmark: Benchmark,
    settings: EvalSettings,
    subject: Subject,
    examples: Sequence[Example],
    store: AnswerStore,
    judge: TimedJudge,
    progress: Progress,
) -> EvalResult:
    began = time.perf_counter()
    generated = _generate(subject, settings, examples, store, progress)
    seconds = time.perf_counter() - began if generated else 0.0
    verdicts = _judge(benchmark, settings, store, judge, progress)
    prompts = [
        _prompt_result(problem, _answers(number, settings, store), judged, settings)
        for number, (problem, judged) in enumerate(zip(benchmark.problems, verdicts, strict=True))
    ]
    return EvalResult(
        settings=settings,
        benchmark=benchmark.name,
        benchmark_digest=benchmark.digest(),
        weights_digest=subject.weights_digest,
        version=stableopd.__version__,
        prompts=prompts,
        num_tokens=sum(length for prompt in prompts for length in prompt.lengths),
        generation_s=round(seconds, 3),
        failure_message=next((one.message for judged in verdicts for one in judged if one.failure), ""),
    )


def _examples(benchmark: Benchmark, settings: EvalSettings, subject: Subject) -> list[Example]:
    context, tokenizer = subject.context, subject.tokenizer
    room = None if context is None else context - (settings.max_completion_length or 1)
    if room is not None and room <= 0:
        raise ConfigError(
            f"--max-completion-length is {settings.max_completion_length}, but the model reads {context} tokens, "
            "prompt included; lower it"
        )
    return load_examples(
        benchmark.rows(chat=settings.chat and bool(tokenizer.chat_template)),
        tokenizer,
        source=benchmark.name,
        max_prompt_tokens=room,
        chat_template_kwargs=settings.chat_template_kwargs,
    )


def _longest_answer(settings: EvalSettings, subject: Subject, examples: Sequence[Example]) -> int:
    if settings.max_completion_length is not None:
        return settings.max_completion_length
    longest = max(len(example.prompt_ids) for example in examples)
    return DEFAULT_LONGEST if subject.context is None else min(DEFAULT_LONGEST, subject.context - longest)


def _folder_name(settings: EvalSettings, benchmark: Benchmark, subject: Subject, examples: Sequence[Example]) -> str:
    """MODEL-WEIGHTS/BENCHMARK-KEY: readable, and another one wherever an answer could be another."""
    sampling: dict[str, Any] = {
        "subject": subject.key(),
        "weights": subject.weights_digest,
        "prompts": key_of({"ids": [example.prompt_ids for example in examples]}),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_completion_length": settings.max_completion_length,
        "seed": settings.seed if settings.temperature else 0,
        "dtype": settings.dtype,
    }
    if settings.stop_strings:
        sampling["stop_strings"] = sorted(set(settings.stop_strings))
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", settings.model).strip("_.")[-60:]
    return f"{name}-{subject.weights_digest[:8]}/{re.sub(r'[^A-Za-z0-9_.-]+', '_', benchmark.name)}-{key_of(sampling)}"


def _generate(
    subject: Subject, settings: EvalSettings, examples: Sequence[Example], store: AnswerStore, progress: Progress
) -> bool:
    """Fill the store; whether there was anything to generate."""
    assert settings.max_completion_length is not None
    missing = store.missing(len(examples), settings.num_samples)
    engine = HFEngine(
        model=subject.model,
        end_token_ids=subject.ends,
        pad_token_id=pad_token_id(subject.tokenizer),
        vocab_size=vocab_size(subject.tokenizer),
        max_batch_size=settings.batch_size,
        autocast=nullcontext,
        tokenizer=subject.tokenizer,
    )
    sampling = Sampling(
        max_new_tokens=settings.max_completion_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=settings.seed,
        stop_strings=settings.stop_strings,
    )
    done = len(examples) - sum(map(len, missing.values()))
    progress("answering", done, len(examples))
    for first, numbers in missing.items():
        lacking = settings.num_samples - first
        rest = replace(sampling, first_generation=first, num_generations=lacking)
        # A few slots' worth at a time: the engine refills slots as answers end, and little is lost to a kill.
        at_once = max(1, 4 * settings.batch_size // lacking)
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            asked = [examples[number] for number in some]
            completions = decode(engine.generate(asked, rest, step=0), asked, subject.tokenizer, subject.ends)
            for place, completion in enumerate(completions):
                store.add(
                    Answer(
                        prompt=some[place // lacking],
                        sample=first + place % lacking,
                        text=completion.text,
                        num_tokens=completion.num_tokens,
                        finish_reason=completion.finish_reason,
                    )
                )
            done += len(some)
            progress("answering", done, len(examples))
    return bool(missing)


def _judge(
    benchmark: Benchmark, settings: EvalSettings, store: AnswerStore, judge: TimedJudge, progress: Progress
) -> list[list[Judged]]:
    """Verdicts by question."""
    verdicts = []
    for number, problem in enumerate(benchmark.problems):
        answers = _answers(number, settings, store)
        verdicts.append(judge.judge_all([(answer.text, problem.answer) for answer in answers]))
        progress("judging", number + 1, len(benchmark.problems))
    return verdicts


def _answers(number: int, settings: EvalSettings, store: AnswerStore) -> list[Answer]:
    return [store.answers[number, sample] for sample in range(settings.num_samples)]


def _prompt_result(
    problem: Problem, answers: Sequence[Answer], verdicts: Sequence[Judged], settings: EvalSettings
) -> PromptResult:
    return PromptResult(
        id=problem.id,
        answer=problem.answer,
        right=[verdict.right for verdict in verdicts],
        votes=[verdict.vote for verdict in verdicts],
        lengths=[one.num_tokens for one in answers],
        finish_reasons=[one.finish_reason for one in answers],
        repetitive=[
            repetition_rate([one.text], settings.tail_chars, settings.compression_threshold) > 0 for one in answers
        ],
        failures=[verdict.failure for verdict in verdicts],
    )


def read_result(path: Path) -> EvalResult:
    """A stored result. Raises: ConfigError when it is none."""
    try:
        return EvalResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no stored evaluation: {error}") from error
