"""Makes golden solutions with the teacher itself: `stableopd data gold`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stableopd.benchmarking.timed import TimedJudge
from stableopd.config import StableOPDConfig, TeacherConfig
from stableopd.curation.gold_file import GoldFile, Prompts
from stableopd.curation.plain import plain_row
from stableopd.curation.sampling import Rejection, check_answers, sample_gold
from stableopd.data import load_examples
from stableopd.errors import ConfigError, DataError
from stableopd.models import context_length, digest_of_weights, load_model, load_tokenizer
from stableopd.reading import Rows, read_rows
from stableopd.rollout.hf import HFEngine
from stableopd.types import Sampling
from stableopd.vocabulary import end_token_ids, pad_token_id, vocab_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class GoldWork:
    """A teacher, prompts and what to do with them, all loaded and checked."""

    config: StableOPDConfig
    rejection: Rejection
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    """Ids that end a completion."""
    sampling: Sampling
    judge: TimedJudge
    result: GoldFile

    @property
    def num_prompts(self) -> int:
        return len(self.result.prompts.examples)

    def run(self, on_prompts: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """Writes the file and its card; returns the card.

        Args: `on_prompts` is told how many prompts are done.

        Raises: DataError when no prompt gets gold; RunFolderError when the file is something else.

        Holds: stopped at any instant and called again, it goes on and writes the same bytes as if it had not been
            stopped. A file that is complete is left as it is.
        """
        finished = self.result.finished()
        if finished is not None:
            self.judge.close()
            return finished
        journal = self.result.journal()
        try:
            sample_gold(
                _engine(self.model, self.config, self.tokenizer, self.ends),
                self.result.prompts.examples,
                self.tokenizer,
                self.sampling,
                self.rejection,
                self.judge,
                journal,
                end_ids=self.ends,
                on_prompts=on_prompts,
            )
            card = self.result.write(journal)
        finally:
            journal.close()
            self.judge.close()
        journal.remove()
        return card


def prepare_gold(config: StableOPDConfig, rejection: Rejection, out: Path, *, gold_prefix: str = "") -> GoldWork:
    """Loads teacher, data and judge (`evaluation.judge`) of the configuration, for golden solutions in `out`.

    Args: `gold_prefix` is put before each solution.

    Raises: ConfigError, ModelError, DataError for what cannot be used; RunFolderError when `out` is something else.
    """
    GoldFile.check_free(out)
    teacher_config = _teacher(config)
    judge = TimedJudge(config.evaluation.judge, setting="evaluation.judge")
    judge.start()
    tokenizer = load_tokenizer(teacher_config, "teacher")
    prompts = _prompts(config, tokenizer)
    model = load_model(teacher_config, "teacher").eval()
    ends = end_token_ids(tokenizer, getattr(model, "generation_config", None)) | {*config.rollout.stop_token_ids}
    sampling = _sampling(config)
    _check_room(model, prompts, sampling)
    settings = {key: value for key, value in asdict(sampling).items() if key != "num_generations"}
    result = GoldFile(
        path=out,
        prompts=prompts,
        settings={
            **settings,
            **asdict(rejection),
            "judge": config.evaluation.judge,
            "gold_prefix": gold_prefix,
            "stop_token_ids": config.rollout.stop_token_ids,
            "gold_column": config.data.gold_column,
            "end_token_ids": sorted(ends),
        },
        names={"teacher": teacher_config.model_name_or_path, "data": config.data.path},
        identity={
            "data_sha256": prompts.sha256,
            "teacher_weights": digest_of_weights(model),
            "asked_sha256": _digest_of_questions(prompts, tokenizer),
        },
    )
    return GoldWork(
        config=config,
        ends=ends,
        rejection=rejection,
        model=model,
        tokenizer=tokenizer,
        sampling=sampling,
        judge=judge,
        result=result,
    )


def _teacher(config: StableOPDConfig) -> TeacherConfig:
    if config.teachers:
        raise ConfigError("teachers: gold comes from one teacher. Name it with --teacher, which replaces them")
    if config.teacher.is_remote:
        raise ConfigError(
            "teacher.server_url: a server scores; gold is drawn with a teacher that is loaded here. Name it with "
            "--teacher, which replaces the server"
        )
    return config.teacher


def _prompts(config: StableOPDConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Prompts in the teacher's own chat template; gold that is there already is not looked at."""
    data = config.data
    if data.path is None:
        raise ConfigError("there are no prompts: give --data, or data.path in the configuration")
    rows = read_rows(data.path, data.split)
    columns = (data.prompt_column, data.answer_column)
    bare = [{key: row[key] for key in columns if key in row} for row in rows]
    placed = Rows(zip(rows.places, bare, strict=True))
    check_answers(placed, rows.places, data.answer_column)
    examples = load_examples(
        placed,
        tokenizer,
        prompt_column=data.prompt_column,
        answer_column=data.answer_column,
        source=data.path,
        max_prompt_tokens=data.max_prompt_length,
        chat_template_kwargs=data.chat_template_kwargs,
    )
    written = [plain_row(row, place) for row, place in zip(rows, rows.places, strict=True)]  # trouble is told at once
    return Prompts(rows=written, examples=examples)


def _digest_of_questions(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what the teacher reads and is judged by, whatever column and template it comes from, and of what its tokens
    mean."""
    asked = [(example.prompt_ids, example.answer) for example in prompts.examples]
    return hashlib.sha256(json.dumps([asked, sorted(tokenizer.get_vocab().items())]).encode()).hexdigest()


def _sampling(config: StableOPDConfig) -> Sampling:
    rollout = config.rollout
    return Sampling(
        max_new_tokens=rollout.max_completion_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        seed=config.seed,
        stop_strings=rollout.stop_strings,
        stop_loops_after=rollout.stop_loops_after,
    )


def _check_room(model: nn.Module, prompts: Prompts, sampling: Sampling) -> None:
    context = context_length(model.config)
    longest = max(len(example.prompt_ids) for example in prompts.examples)
    if context is not None and longest + sampling.max_new_tokens > context:
        raise DataError(
            f"the longest prompt has {longest} tokens and completions may have {sampling.max_new_tokens}, more than "
            f"the teacher's context of {context}. "
            + (
                f"Lower --max-completion-length to {context - longest} at most, or remove"
                if context > longest
                else "Remove"
            )
            + " long prompts"
        )


def _engine(
    model: nn.Module, config: StableOPDConfig, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
) -> HFEngine:
    placed = config.teacher.device_map is not None or config.teacher.quantization is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return HFEngine(
        model=model if placed else model.to(device),
        end_token_ids=ends,
        pad_token_id=pad_token_id(tokenizer),
        vocab_size=vocab_size(tokenizer),
        tokenizer=tokenizer,
        max_batch_size=config.rollout.max_batch_size,
    )
