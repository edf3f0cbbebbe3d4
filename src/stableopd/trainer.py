"""The loop: generate, look, score, update, log, evaluate, save; and the TRL-shaped facade around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.assembly import assemble, with_names
from stableopd.checkpoint import (
    checkpoints_in,
    clean_up,
    load_checkpoint,
    read_state,
    rotate,
    save_checkpoint,
    save_model,
)
from stableopd.config import StableOPDConfig
from stableopd.config_files import check_resumable, dump_config, flatten
from stableopd.errors import ConfigError, RunFolderError
from stableopd.evaluate import Completion, decode, evaluate
from stableopd.health.monitor import HealthMonitor
from stableopd.health.signals import is_repetitive
from stableopd.metrics import Stopwatch, TrackerSink, mean_of
from stableopd.models import computing_module
from stableopd.optimizer import learning_rate_at
from stableopd.preparation import Dataset
from stableopd.protocols import Callback, MetricSink
from stableopd.recorder import RunRecorder, check_nothing_lost
from stableopd.step import TrainingRows, concat_rows, gold_rows, minibatches, rollout_rows
from stableopd.types import Alert, Example, HealthReport, RolloutBatch, Sampling, TokenScores, TrainState
from stableopd.vocabulary import pad_token_id

_TRAIN_STREAM, _EVAL_STREAM, _MINIBATCH_STREAM = 1, 2, 3


class StableOPDTrainer:
    """Trains a student on its own rollouts under a teacher, with golden solutions and a tie to where it began.

    Args:
        model: the student: a model, a local folder or a hub id. Default: `args.student`.
        teacher_model: likewise; default `args.teacher`. Not loaded when no term needs it.
        args: the configuration of the run.
        train_dataset: rows with a prompt (text or chat messages) and, where the gold term is on, a golden solution;
            anything that yields mappings. Default: `args.data.path`.
        eval_dataset: held-out rows with an answer. Default: `args.evaluation.path`; none is fine.
        processing_class: the student's tokenizer; default: the one beside the student.
        callbacks: see `stableopd.protocols.Callback`.
        peft_config: adapters to train in place of all weights; default: those of `args.student.lora`, if any.

    Raises: ConfigError, DataError or ModelError before anything is written, when the run cannot work.
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        teacher_model: str | nn.Module | None = None,
        args: StableOPDConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Callback] = (),
        peft_config: Any = None,
    ) -> None:
        self.config = with_names(args or StableOPDConfig(), model, teacher_model)
        self.callbacks = list(callbacks)
        parts = assemble(self.config, model, teacher_model, train_dataset, eval_dataset, processing_class, peft_config)
        self.accelerator = parts.accelerator
        self.tokenizer = parts.tokenizer
        self.data = parts.data
        self.student = parts.student
        self.teacher = parts.teacher
        self.engine = parts.engine
        self.updater = parts.updater
        self.judge = parts.judge
        self.monitor = HealthMonitor(self.config.health.monitor_settings())
        self.state = TrainState(begun_with=parts.digests)
        self.recorder: RunRecorder | None = None
        self._sinks: list[MetricSink] = []

    # ------------------------------------------------------------------ the loop

    def train(self, resume_from_checkpoint: bool = False) -> TrainState:
        """Run to `max_steps`; with `resume_from_checkpoint`, go on from the newest checkpoint of the run folder.

        Raises: RunFolderError when the run folder is occupied, locked, or belongs to another configuration.
        """
        if not isinstance(resume_from_checkpoint, bool):
            raise ConfigError(
                "resume_from_checkpoint is True or False: a run goes on from the newest checkpoint of its own folder. "
                "To begin another run from a checkpoint, give its folder as the student"
            )
        try:
            self._open_run_folder(resume_from_checkpoint)
            self._each_callback("on_train_begin")
            if self.state.step == 0 and self.config.evaluation.at_start and self.data.held_out:
                self._each_callback("on_phase", 0, "evaluation")
                metrics = self.evaluate()
                self._log(0, metrics, self.monitor.observe_eval(0, metrics))
            for step in range(self.state.step + 1, self.config.max_steps + 1):
                self.train_step(step)
            self._each_callback("on_train_end")
        finally:
            self._close_run_folder()
        return self.state

    def train_step(self, step: int) -> dict[str, float]:
        """One rollout batch: generate, score, look, update, log, evaluate, save."""
        torch.manual_seed(_seed(self.config.seed, _TRAIN_STREAM, step))
        clock = Stopwatch()
        positions, examples = self._my_prompts(step)
        metrics: dict[str, float] = {}
        alerts: tuple[Alert, ...] = ()
        rollouts = scores = None
        if self.config.objective.needs_rollouts:
            with self._phase(clock, step, "rollout"):
                rollouts = self.engine.generate(examples, self._sampling(), step=step)
            with self._phase(clock, step, "teacher"):
                scores = self._score(rollouts)
            with self._phase(clock, step, "health"):
                health = self._observe(step, positions, examples, rollouts, scores)
                metrics.update(health.metrics)
                alerts += health.alerts
        with self._phase(clock, step, "update"):
            metrics.update(self._update(step, positions, examples, rollouts, scores))
            self.engine.sync_weights(computing_module(self.student), self.state.policy_version)
        metrics.update(clock.metrics())
        if self.data.held_out and self._due(step, self.config.evaluation.every_steps):
            self._each_callback("on_phase", step, "evaluation")
            evaluation = self.evaluate()
            metrics.update(evaluation)
            alerts += self.monitor.observe_eval(step, evaluation)
        self._advance(step, metrics)
        self._log(step, metrics, alerts)
        self._save_if_due(step, metrics)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Answers of the student to the held-out prompts, sampled and greedy, as `eval/NAME/...`."""
        settings, health = self.config.evaluation, self.config.health
        sampled = Sampling(
            max_new_tokens=self.config.eval_max_completion_length,
            temperature=settings.temperature,
            top_p=settings.top_p,
            num_generations=settings.num_samples,
            seed=_seed(self.config.seed, _EVAL_STREAM),
        )
        runs = {settings.name: sampled}
        if settings.greedy:
            runs[f"{settings.name}_greedy"] = Sampling(max_new_tokens=sampled.max_new_tokens, temperature=0.0)
        mine = self.data.held_out[self.accelerator.process_index :: self.accelerator.num_processes]
        metrics: dict[str, float] = {}
        for name, sampling in runs.items():
            metrics |= evaluate(
                self.engine,
                mine,
                sampling,
                name=name,
                judge=self.judge,
                tokenizer=self.tokenizer,
                tail_chars=health.tail_chars,
                compression_threshold=health.compression_threshold,
            )
        self._each_callback("on_evaluate", metrics)
        return metrics

    def save_model(self, output_dir: str | Path) -> None:
        """Write the student as it is now, for `AutoModelForCausalLM.from_pretrained`."""
        if self.accelerator.is_main_process:
            save_model(self.student, self.tokenizer, Path(output_dir))

    # ------------------------------------------------------------------ parts of a step

    @contextmanager
    def _phase(self, clock: Stopwatch, step: int, name: str) -> Iterator[None]:
        self._each_callback("on_phase", step, name)
        with clock.phase(name):
            yield

    def _my_prompts(self, step: int) -> tuple[list[int], list[Example]]:
        """This process's share of the step's prompts, with their positions among all of them."""
        batch = self.data.stream.batch(step)
        positions = list(range(self.accelerator.process_index, len(batch), self.accelerator.num_processes))
        return positions, [batch[position] for position in positions]

    def _sampling(self) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            max_new_tokens=rollout.max_completion_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            num_generations=rollout.num_generations,
            seed=_seed(self.config.seed, _TRAIN_STREAM),
        )

    def _score(self, rollouts: RolloutBatch) -> TokenScores | None:
        if self.teacher is None:
            return None
        return self.teacher.score(rollouts, temperature=self.config.rollout.temperature)

    def _observe(
        self,
        step: int,
        positions: list[int],
        examples: list[Example],
        rollouts: RolloutBatch,
        scores: TokenScores | None,
    ) -> HealthReport:
        """Health of the step's rollouts of all processes; some of them are written to the run folder."""
        completions = decode(rollouts, examples, self.tokenizer)
        advantages = [None] * len(completions) if scores is None else _advantages(rollouts, scores)
        mine = [
            (positions[index], completion, row)
            for index, completion, row in zip(rollouts.prompt_index, completions, advantages, strict=True)
        ]
        records = sorted(gather_object(mine), key=lambda record: record[0])
        everyone = [completion for _, completion, _ in records]
        report = self.monitor.observe(
            step,
            lengths=[completion.num_tokens for completion in everyone],
            finish_reasons=[completion.finish_reason for completion in everyone],
            texts=[completion.text for completion in everyone],
            token_ids=[completion.token_ids for completion in everyone],
            advantages=None if scores is None else [row for _, _, row in records],
        )
        if self._due(step, self.config.logging.rollouts_every_steps) or step == 1:
            self._write_rollouts(step, [(completion, row) for _, completion, row in records])
        return report

    def _update(
        self,
        step: int,
        positions: list[int],
        examples: list[Example],
        rollouts: RolloutBatch | None,
        scores: TokenScores | None,
    ) -> dict[str, float]:
        """All optimizer updates of a step; returns their mean figures."""
        pad_id = pad_token_id(self.tokenizer)
        parts: list[TrainingRows] = []
        if rollouts is not None:
            parts.append(rollout_rows(rollouts, scores, positions))
        if self.config.objective.needs_gold:
            gold = self.data.gold(step, self.data.stream.batch(step))
            parts.append(gold_rows([gold[p] for p in positions], positions, pad_id, self.accelerator.device))
        rows = concat_rows(parts, pad_id)
        rate = learning_rate_at(step, self.config.optimizer, self.config.max_steps)
        figures = []
        key = [self.config.seed, _MINIBATCH_STREAM, step]
        for minibatch in minibatches(rows, self.config.rollout.num_prompts, self.config.optimizer, key):
            figures.append(self.updater.update(minibatch, rate))
            self.state.policy_version += int(not figures[-1]["skipped_updates"])
        metrics = mean_of(figures)
        if rollouts is not None:
            # Later updates of a step see a policy that has moved on; the engine's own error shows in the first.
            metrics["sampling/logprob_gap"] = figures[0]["sampling/logprob_gap"]
            metrics["num_new_tokens"] = float(sum(gather_object(rollouts.lengths())))
            if scores is not None:
                metrics["teacher/reverse_kl"] = self._mean_reverse_kl(rollouts, scores)
        return {**metrics, "learning_rate": rate}

    def _mean_reverse_kl(self, rollouts: RolloutBatch, scores: TokenScores) -> float:
        """Mean of log S − log T over the rollout tokens of all processes."""
        gap = ((rollouts.sampling_logprobs - scores.sampled_logprobs) * rollouts.completion_mask).sum().double()
        sums = self.accelerator.reduce(torch.stack([gap, rollouts.completion_mask.sum().double()]), reduction="sum")
        return float(sums[0] / sums[1])

    def _advance(self, step: int, metrics: dict[str, float]) -> None:
        self.state.step = step
        self.state.num_tokens += int(metrics.pop("num_new_tokens", 0.0))
        self.state.prompt_cursor = self.data.stream.cursor(step)
        self.state.monitor = self.monitor.state_dict()
        metrics["num_tokens"] = float(self.state.num_tokens)

    # ------------------------------------------------------------------ run folder

    def _open_run_folder(self, resume: bool) -> None:
        path = self.config.run_dir
        if resume:
            check_resumable(path / "config.yaml", self.config)
        self.recorder = RunRecorder(path, resume=resume) if self.accelerator.is_main_process else None
        self.accelerator.wait_for_everyone()
        after_step = self._resume(path) if resume else None
        self.accelerator.wait_for_everyone()  # what a resuming process reads is rewritten next
        if self.recorder:
            self.recorder.start(dump_config(self.config), after_step)
        if self.config.logging.report_to:
            self._sinks.append(TrackerSink(self.accelerator, "stableopd", flatten(self.config.model_dump(mode="json"))))

    def _resume(self, path: Path) -> int | None:
        """Step of the checkpoint from which the run goes on; None when it was killed before its first one."""
        clean_up(path / "checkpoints")
        found = checkpoints_in(path / "checkpoints")
        if not found:
            check_nothing_lost(path)
            return None
        stored, now = read_state(found[-1]).begun_with, self.state.begun_with
        changed = [name for name, digest in stored.items() if now.get(name) != digest]
        if changed:
            raise RunFolderError(
                f"{path} was begun with another {' and another '.join(changed)}, though the configuration names the "
                "same: the reference and the order of prompts would change in the middle of the run. Put the old one "
                "back, or choose another output_dir"
            )
        self.state = load_checkpoint(found[-1], student=self.student, optimizer=self.updater.optimizer)
        self.monitor.load_state_dict(self.state.monitor)
        self.engine.sync_weights(computing_module(self.student), self.state.policy_version)
        return self.state.step

    def _close_run_folder(self) -> None:
        for sink in self._sinks:
            sink.close()
        if self.recorder:
            self.recorder.close()
        self._sinks, self.recorder = [], None

    def _write_rollouts(self, step: int, records: list[tuple[Completion, np.ndarray | None]]) -> None:
        if self.recorder is None or not self.config.logging.num_rollouts:
            return
        health = self.config.health
        self.recorder.rollouts(
            step,
            [
                {
                    "step": step,
                    "index": completion.example.index,
                    "prompt": completion.example.prompt,
                    "completion": completion.text,
                    "finish_reason": completion.finish_reason,
                    "num_tokens": completion.num_tokens,
                    "repetitive": is_repetitive(completion.text, health.tail_chars, health.compression_threshold),
                    "answer": completion.example.answer,
                    "mean_advantage": None if row is None else float(row.mean()),
                }
                for completion, row in records[: self.config.logging.num_rollouts]
            ],
        )

    def _log(self, step: int, metrics: dict[str, float], alerts: tuple[Alert, ...]) -> None:
        if self.recorder:
            self.recorder.metrics(step, metrics)
            self.recorder.alerts(alert.to_json() for alert in alerts)
        for sink in self._sinks:
            sink.write(step, metrics)
        self._each_callback("on_step_end", {"step": step, **metrics}, alerts)

    def _save_if_due(self, step: int, metrics: dict[str, float]) -> None:
        settings = self.config.checkpoint
        accuracy = metrics.get(f"eval/{self.config.evaluation.name}/accuracy")
        best = accuracy is not None and (self.state.best_metric is None or accuracy > self.state.best_metric)
        if best:
            self.state.best_metric, self.state.best_step = accuracy, step
        if not (self._due(step, settings.every_steps) or (best and settings.keep_best)):
            return
        if self.accelerator.is_main_process:
            folder = self.config.run_dir / "checkpoints"
            path = save_checkpoint(
                folder,
                student=self.student,
                tokenizer=self.tokenizer,
                optimizer=self.updater.optimizer,
                state=self.state,
            )
            rotate(
                folder,
                keep_last=settings.keep_last,
                keep_step=self.state.best_step if settings.keep_best else None,
            )
            self._each_callback("on_save", str(path))
        self.accelerator.wait_for_everyone()

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.max_steps

    def _each_callback(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)


def _advantages(rollouts: RolloutBatch, scores: TokenScores) -> list[np.ndarray]:
    """log T − log S of each completion token, without padding."""
    gap = (scores.sampled_logprobs - rollouts.sampling_logprobs).float().cpu().numpy()
    return [row[:length] for row, length in zip(gap, rollouts.lengths(), strict=True)]


def _seed(*key: int) -> int:
    """A seed below 2^63 that depends on every part of the key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
