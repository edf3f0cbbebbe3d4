"""What has been drawn so far, and the batch that it becomes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stableopd.errors import ModelError
from stableopd.protocols import OnFinished
from stableopd.rollout.slots import Row, Slots
from stableopd.tokens import pad_left
from stableopd.types import Example, FinishedRollout, FinishReason, RolloutBatch


class Drawn:
    """The completions of all rows of a request, written a token at a time; tells of each row as it ends."""

    def __init__(
        self,
        rows: Sequence[Row],
        examples: Sequence[Example],
        max_new_tokens: int,
        ends: Tensor,
        on_finished: OnFinished | None,
    ) -> None:
        self._rows, self._examples, self._on_finished = rows, examples, on_finished
        self._ends = ends
        """[E] int64: ids that end a completion."""
        shape, device = (len(rows), max_new_tokens + 1), ends.device
        self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
        """[N, max_new_tokens + 1]: arbitrary from a row's length on. The last column is for rows that have ended."""
        self._logprobs = torch.zeros(shape, device=device)
        self._lengths = torch.zeros(len(rows), dtype=torch.int64, device=device)
        self._stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self._looped = torch.zeros_like(self._stopped)

    def write(self, slots: Slots, token: Tensor, logprob: Tensor) -> None:
        """One more token [b] and its log-probability [b] for the rows that are alive."""
        column = slots.counts.where(slots.alive, self.ids.shape[1] - 1)
        self.ids[slots.rows, column] = token
        self._logprobs[slots.rows, column] = logprob
        slots.counts = slots.counts + slots.alive
        slots.longest = min(slots.longest + 1, self.ids.shape[1] - 1)

    def is_end(self, token: Tensor) -> Tensor:
        """[b] bool for ids [b]."""
        return (token[:, None] == self._ends).any(dim=1)

    def mark_stopped(self, slots: Slots, now: Tensor) -> None:
        """Rows `now` [b] bool have completed a stop string."""
        self._stopped[slots.rows] |= now

    def mark_looped(self, slots: Slots, now: Tensor) -> None:
        """Rows `now` [b] bool are ended in a loop."""
        self._looped[slots.rows] |= now

    def close(self, slots: Slots, ended: Tensor) -> None:
        """Rows `ended` [b] bool have just got their last token."""
        numbers, lengths = slots.rows[ended], slots.counts[ended]
        self._lengths[numbers] = lengths
        if self._on_finished is None:
            return
        ids = self.ids[numbers, : slots.longest].tolist()
        for number, length, completion in zip(numbers.tolist(), lengths.tolist(), ids, strict=True):
            row = self._rows[number]
            self._on_finished(
                FinishedRollout(
                    prompt_ids=row.prompt_ids,
                    completion_ids=tuple(completion[:length]),
                    teacher=self._examples[row.prompt].teacher,
                )
            )

    def batch(self, pad_id: int, policy_version: int) -> RolloutBatch:
        """All completions, in the order of the rows."""
        device, width = self.ids.device, int(self._lengths.max())
        prompt_ids, prompt_mask = pad_left([row.prompt_ids for row in self._rows], pad_id, device)
        mask = torch.arange(width, device=device) < self._lengths[:, None]
        teachers = tuple(self._examples[row.prompt].teacher for row in self._rows)
        return RolloutBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=self.ids[:, :width].where(mask, pad_id),
            completion_mask=mask,
            sampling_logprobs=_require_finite(self._logprobs[:, :width].where(mask, 0.0)),
            finish_reason=self._finish_reasons(),
            prompt_index=tuple(row.prompt for row in self._rows),
            policy_version=policy_version,
            teachers=teachers if any(teachers) else (),
        )

    def _finish_reasons(self) -> tuple[FinishReason, ...]:
        last = self.ids.gather(1, self._lengths[:, None] - 1).squeeze(1)
        stopped = self._stopped | self.is_end(last)
        flags = zip(stopped.tolist(), self._looped.tolist(), strict=True)
        return tuple("stop" if stop else "loop" if loop else "length" for stop, loop in flags)


def _require_finite(logprobs: Tensor) -> Tensor:
    if not bool(logprobs.isfinite().all()):
        raise ModelError(
            "The student's logits are not finite (NaN or infinity), so nothing can be drawn from them. Its weights "
            "have probably diverged: go back to an earlier checkpoint, with a lower learning rate or a wider dtype."
        )
    return logprobs
