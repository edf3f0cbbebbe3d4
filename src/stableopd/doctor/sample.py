"""What the doctor lets the models do: a few rollouts of the student, and scores of rollouts and gold by both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stableopd.config import StableOPDConfig
from stableopd.errors import ConfigError, TeacherError
from stableopd.heads import HeadlessModel
from stableopd.models import computing_module
from stableopd.protocols import Teacher
from stableopd.rollout.hf import HFEngine
from stableopd.scoring import Autocast, Scores, completion_scores
from stableopd.teachers.local import LocalTeacher
from stableopd.tokens import pad_left, pad_right
from stableopd.types import Example, RolloutBatch, Sampling, TokenScores
from stableopd.vocabulary import pad_token_id, vocab_size

MOST_TOPK = 16
_NUM_GENERATIONS = 2


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Rollouts and golden solutions, and what student and teacher say of each of their tokens."""

    rollouts: RolloutBatch
    examples: Sequence[Example]
    student: Scores
    teacher: TokenScores | None
    gold: RolloutBatch | None
    """Golden solutions that end in an end token; one that is cut off says nothing about ends."""
    gold_student: Scores | None
    gold_teacher: TokenScores | None


class Bench:
    """Student and teacher, ready to answer the doctor's questions at the run's temperature."""

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | Teacher | None,
        tokenizer: Any,
        end_ids: Collection[int],
        config: StableOPDConfig,
        device: torch.device,
        seed: int,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.end_ids = frozenset(end_ids)
        self.device = device
        self._seed = seed
        bf16 = config.optimizer.bf16
        self._autocast: Autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16) if bf16 else nullcontext
        self._pad_id = pad_token_id(tokenizer)
        self._num_ids = vocab_size(tokenizer)
        self._topk = min(MOST_TOPK, max(1, self._num_ids // 8))  # of a tiny vocabulary any two would share most
        self._model = computing_module(student)
        self._headless: HeadlessModel | None = None
        self._teacher = teacher
        if isinstance(teacher, nn.Module):
            self._teacher = LocalTeacher(
                teacher,
                model_id="teacher",
                vocab_size=self._num_ids,
                token_budget=config.optimizer.micro_batch_tokens,
                autocast=self._autocast,
            )

    def sample(self, examples: Sequence[Example], say: Callable[[str], None]) -> Sample:
        """Rollouts of the student to these prompts, scored by both; and their gold, where they have some."""
        say("generating rollouts of the student")
        rollouts = self.rollouts(examples)
        say("scoring rollouts and gold")
        with_gold = [example for example in examples if example.gold_ids and example.gold_ids[-1] in self.end_ids]
        gold = self._gold(with_gold) if with_gold else None
        return Sample(
            rollouts=rollouts,
            examples=examples,
            student=self.student_scores(rollouts, topk=self._topk),
            teacher=self.teacher_scores(rollouts, topk=self._topk),
            gold=gold,
            gold_student=None if gold is None else self.student_scores(gold),
            gold_teacher=None if gold is None else self.teacher_scores(gold, topk=self._topk),
        )

    def rollouts(self, examples: Sequence[Example]) -> RolloutBatch:
        rollout = self.config.rollout
        engine = HFEngine(
            model=self._model,
            end_token_ids=self.end_ids,
            pad_token_id=self._pad_id,
            vocab_size=self._num_ids,
            max_batch_size=rollout.max_batch_size,
            tokenizer=self.tokenizer,
            autocast=self._autocast,
        )
        sampling = Sampling(
            max_new_tokens=rollout.max_completion_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            num_generations=min(_NUM_GENERATIONS, rollout.num_generations),
            stop_strings=rollout.stop_strings,
            stop_loops_after=rollout.stop_loops_after,
            seed=self._seed,
        )
        return engine.generate(examples, sampling, step=0)

    def student_scores(self, rollouts: RolloutBatch, *, topk: int = 0, token_budget: int | None = None) -> Scores:
        # Made after generation, as it may set the model's attention to one that packs.
        self._headless = self._headless or HeadlessModel(self._model, self._num_ids)
        return completion_scores(
            self._headless,
            rollouts,
            temperature=self.config.rollout.temperature,
            token_budget=token_budget or self.config.optimizer.micro_batch_tokens,
            autocast=self._autocast,
            entropy=topk > 0,
            topk=topk,
        )

    def teacher_scores(self, rollouts: RolloutBatch, *, topk: int = 0) -> TokenScores | None:
        """With the likeliest tokens where the teacher gives them; None without a teacher."""
        if self._teacher is None:
            return None
        assert not isinstance(self._teacher, nn.Module)
        temperature = self.config.rollout.temperature
        try:
            return self._teacher.score(rollouts, temperature=temperature, topk=topk)
        except (ConfigError, TeacherError):  # a server that gives none
            if not topk:
                raise
            return self._teacher.score(rollouts, temperature=temperature)

    @property
    def teacher_is_here(self) -> bool:
        """Whether the teacher, if there is one, runs in this process, so that its arithmetic is known."""
        return self._teacher is None or isinstance(self._teacher, LocalTeacher)

    def modules(self) -> list[nn.Module]:
        """The models that run in this process."""
        return [self._model, *([self._teacher.model] if isinstance(self._teacher, LocalTeacher) else [])]

    def _gold(self, examples: Sequence[Example]) -> RolloutBatch:
        """Golden solutions in the shape of rollouts."""
        prompt_ids, prompt_mask = pad_left([example.prompt_ids for example in examples], self._pad_id, self.device)
        golds = [example.gold_ids or () for example in examples]
        ids, mask = pad_right(golds, self._pad_id, device=self.device)
        return RolloutBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=ids,
            completion_mask=mask,
            sampling_logprobs=torch.zeros(ids.shape, device=self.device),
            finish_reason=tuple("stop" for _ in examples),
            prompt_index=tuple(range(len(examples))),
        )


def last_tokens(values: Tensor, rollouts: RolloutBatch, rows: Sequence[int]) -> Tensor:
    """[len(rows), ...]: of each row named, what [B, T, ...] values say of its last token."""
    index = torch.tensor(list(rows), dtype=torch.long, device=values.device)
    return values[index, rollouts.completion_mask.sum(dim=1).to(values.device)[index] - 1]
