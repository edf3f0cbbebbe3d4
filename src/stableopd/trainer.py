"""The loop: generate, look, score, update, log, evaluate, save; and the TRL-shaped facade around it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.advantages import RolloutSignals, corrected_tokens, rollout_signals, without_loops
from stableopd.assembly import assemble, with_names
from stableopd.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    load_checkpoint,
    load_first_readable,
    newest_of_this_run,
    rotate,
    save_checkpoint,
    save_model,
)
from stableopd.config import StableOPDConfig
from stableopd.config_files import check_resumable
from stableopd.errors import ConfigError, TrainingError
from stableopd.evaluate import decode
from stableopd.health.causes import why_without_updates
from stableopd.health.controller import Controls, HealthController, Levers
from stableopd.health.history import FAILED_REWARDS
from stableopd.health.monitor import HealthMonitor
from stableopd.heldout import evaluate_all
from stableopd.logbook import Logbook
from stableopd.metrics import Stopwatch, mean_of
from stableopd.models import computing_module
from stableopd.observation import StepBatch, all_advantages, gather_views, overlap
from stableopd.optimizer import learning_rate_at
from stableopd.preparation import Dataset
from stableopd.protocols import Callback
from stableopd.recorder import check_nothing_lost
from stableopd.rewards import check_rewards, reward_figures, reward_note, score_completions
from stableopd.rollout.source import RolloutSource
from stableopd.rows import TrainingRows, concat_rows, gold_rows, minibatches, rollout_rows
from stableopd.teaching import topk_of
from stableopd.types import Alert, HealthReport, RolloutBatch, Sampling, TrainState
from stableopd.vocabulary import pad_token_id

MAX_STEPS_WITHOUT_UPDATE = 10
"""So many steps in a row without a single update end a run: from the same weights the next would be no better."""
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
        self.end_ids = parts.end_ids
        self.source = self._source()
        self.updater = parts.updater
        self.judge = parts.judge
        self.reward = parts.reward
        self.special_ids = parts.special_ids
        self.probe_rows = parts.probe_rows
        self.findings = parts.findings
        self.monitor = HealthMonitor(self.config.health.monitor_settings())
        self.controller = HealthController(self.config.health.controller_settings(), self._levers())
        self.state = TrainState(begun_with=parts.digests)
        self.logbook: Logbook | None = None
        self._told_of_failed_rewards = False

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
            self._tell_of_findings()
            if self.state.step == 0 and self.config.evaluation.at_start and self.data.is_evaluated:
                self._each_callback("on_phase", 0, "evaluation")
                metrics = self.evaluate()
                self._log(0, metrics, self.monitor.observe_eval(0, metrics))
            for step in range(self.state.step + 1, self.config.max_steps + 1):
                self.train_step(step)
                if self.state.stopped:
                    break
            if self.config.student.lora is not None and self.config.student.lora.merge:
                self.save_model(self.config.run_dir / "merged", merge_adapters=True)
            self._each_callback("on_train_end")
        finally:
            self.source.drop()
            if self.logbook:
                self.logbook.close()
                self.logbook = None
        return self.state

    def train_step(self, step: int) -> dict[str, float]:
        """One rollout batch: generate, score, look, decide, update, log, evaluate, save."""
        torch.manual_seed(_seed(self.config.seed, _TRAIN_STREAM, step))
        clock = Stopwatch()
        batch = self._my_prompts(step)
        if self.config.objective.needs_rollouts:
            with self._phase(clock, step, "rollout"):
                batch.rollouts = self.source.rollouts(batch.examples, self._sampling(), step=step)
            if self._goes_ahead(step):
                self.source.begin(self._my_prompts(step + 1).examples, self._sampling(), step=step + 1)
            with self._phase(clock, step, "teacher"):
                batch.scores = self.source.scores(batch.rollouts)
                batch.teacher_logprobs = None if batch.scores is None else batch.scores.sampled_logprobs
        with self._phase(clock, step, "health"):
            health = self._observe(batch)
            controls, done = self._decide(step)
        metrics = {**health.metrics, **self.controller.metrics()}
        alerts = health.alerts + done
        if controls.rollback_to is not None:
            self._roll_back(controls.rollback_to)
        elif controls.stop:
            self.source.drop()
        else:
            with self._phase(clock, step, "update"):
                figures = self._update(batch, controls)
                metrics.update(figures)
                alerts += self.monitor.judge(step, figures)  # updates that were not made
            with clock.phase("rollout"):
                self.source.wait()
            with clock.phase("sync"):
                self.source.sync(computing_module(self.student), self.state.policy_version)
        metrics.update(self._hindsight(batch))
        metrics.update(clock.metrics())
        if self.data.is_evaluated and self._due(step, self.config.evaluation.every_steps):
            self._each_callback("on_phase", step, "evaluation")
            evaluation = self.evaluate()
            metrics.update(evaluation)
            alerts += self.monitor.observe_eval(step, evaluation)
        self._advance(step, metrics, stopped=controls.stop)
        self._log(step, metrics, alerts)
        self._end_without_updates(step, metrics)
        self._save_if_due(step, metrics)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Answers of the student to the held-out prompts, sampled and greedy, as `eval/NAME/...`."""
        own = {self.config.evaluation.name: self.data.held_out} if self.data.held_out else {}
        metrics = evaluate_all(
            self.config,
            self.engine,
            {**own, **self.data.benchmarks},
            judge=self.judge,
            tokenizer=self.tokenizer,
            end_ids=self.end_ids,
            seed=_seed(self.config.seed, _EVAL_STREAM),
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        self._each_callback("on_evaluate", metrics)
        return metrics

    def save_model(self, output_dir: str | Path, *, merge_adapters: bool = False) -> None:
        """Write the student as it is now, for `AutoModelForCausalLM.from_pretrained`: adapters by themselves, or merged
        into a whole model."""
        if self.accelerator.is_main_process:
            save_model(self.student, self.tokenizer, Path(output_dir), merge_adapters=merge_adapters)

    # ------------------------------------------------------------------ parts of a step

    @contextmanager
    def _phase(self, clock: Stopwatch, step: int, name: str) -> Iterator[None]:
        self._each_callback("on_phase", step, name)
        with clock.phase(name):
            yield

    def _my_prompts(self, step: int) -> StepBatch:
        """This process's share of the step's prompts."""
        prompts = self.data.stream.batch(step)
        positions = list(range(self.accelerator.process_index, len(prompts), self.accelerator.num_processes))
        return StepBatch(step=step, positions=positions, examples=[prompts[position] for position in positions])

    def _sampling(self) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            max_new_tokens=self.controller.controls().max_completion_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            num_generations=rollout.num_generations,
            stop_strings=rollout.stop_strings,
            stop_loops_after=rollout.stop_loops_after,
            seed=_seed(self.config.seed, _TRAIN_STREAM),
        )

    def _tell_of_findings(self) -> None:
        for finding in self.findings:
            if finding.danger != "note":
                self._each_callback("on_note", f"{finding.check}: {finding.summary}. {finding.remedy}")

    def _source(self) -> RolloutSource:
        return RolloutSource(
            self.engine,
            self.teacher,
            temperature=self.config.rollout.temperature,
            topk=topk_of(self.config),
            states=self.config.objective.distill.needs_states,
        )

    def _goes_ahead(self, step: int) -> bool:
        """Whether the next step's rollouts are made during this one.

        Not across a checkpoint: the step after one starts from its weights, so that a resumed run is the same run.
        """
        return self.config.rollout.pipeline and step < self.config.max_steps and not self._may_save(step)

    def _observe(self, batch: StepBatch) -> HealthReport:
        """Health of the student before the step's update: its rollouts, where there are some, and the stop probe."""
        report = HealthReport(step=batch.step, metrics={})
        if batch.rollouts is not None:
            report = self._observe_rollouts(batch)
        if self.probe_rows is not None:
            probe = self.updater.probe(self.probe_rows)
            alerts = report.alerts + self.monitor.judge(batch.step, probe)
            report = replace(report, metrics={**report.metrics, **probe}, alerts=alerts)
        return replace(report, metrics={**report.metrics, **self.monitor.derived})

    def _observe_rollouts(self, batch: StepBatch) -> HealthReport:
        """Texts and rewards of the step's rollouts, and the health of all processes' rollouts together."""
        assert batch.rollouts is not None
        batch.completions = decode(batch.rollouts, batch.examples, self.tokenizer, self.end_ids)
        figures: dict[str, float] = {}
        if self.reward is not None:
            batch.rewards, mine = score_completions(batch.completions, self.reward)
            rewards, failures = gather_object(batch.rewards), gather_object(mine)
            self._tell_of_failed_rewards(batch.step, failures, len(rewards))
            figures = reward_figures(rewards, len(failures))
        figures |= self._overlap(batch)
        views = gather_views(batch)
        report = self.monitor.observe(
            batch.step,
            lengths=[view.completion.num_tokens for view in views],
            finish_reasons=[view.completion.finish_reason for view in views],
            texts=[view.completion.text for view in views],
            token_ids=[view.completion.token_ids for view in views],
            advantages=all_advantages(views),
            accuracy=figures.get("reward/right_fraction"),
            other_budget=self.source.budget != self.config.rollout.max_completion_length,
        )
        judged = self.monitor.judge(batch.step, {key: figures[key] for key in figures if key == FAILED_REWARDS})
        report = replace(report, alerts=report.alerts + judged)
        return replace(report, metrics={**report.metrics, **figures})

    def _overlap(self, batch: StepBatch) -> dict[str, float]:
        """How alike student and teacher are at the visited states, where their likeliest tokens are asked for."""
        teacher = batch.scores
        if not self.config.health.overlap_topk or teacher is None or teacher.topk_ids is None:
            return {}
        assert batch.rollouts is not None
        student = self.updater.score(batch.rollouts, topk=teacher.topk_ids.shape[-1])
        found = overlap(student, teacher, batch.rollouts.completion_mask)
        return {name: self._token_mean(values, batch.rollouts.completion_mask) for name, values in found.items()}

    def _tell_of_failed_rewards(self, step: int, failures: Sequence[str], num_rewards: int) -> None:
        function = self.config.objective.reward.function
        check_rewards(step, failures, num_rewards, function)
        if failures and not self._told_of_failed_rewards:
            self._told_of_failed_rewards = True
            self._each_callback("on_note", reward_note(step, failures, num_rewards, function))

    def _levers(self) -> Levers:
        objective = self.config.objective
        return Levers(
            gold_coef=objective.gold.coef,
            reference_coef=objective.reference.coef,
            has_gold=self.config.may_need_gold and self.data.has_gold,
            has_reference=self.config.needs_reference,
            max_completion_length=self.config.rollout.max_completion_length,
        )

    def _decide(self, step: int) -> tuple[Controls, tuple[Alert, ...]]:
        """What the controller makes of the alarms that are on."""
        if self.controller.checkpoints_needed:
            seen = checkpoint_steps(self.config.run_dir / "checkpoints")
            self.controller.lost_all_but(gather_object([seen])[0])  # all must decide alike
        return self.controller.decide(step, self.monitor.alarms)

    def _roll_back(self, step: int) -> None:
        """Weights, optimizer and the monitor's memory as they were after `step`. Steps and tokens go on counting."""
        self.source.drop()
        steps = [step, *reversed(self.controller.checkpoints_needed)]
        then = load_first_readable(
            [checkpoint_path(self.config.run_dir / "checkpoints", one) for one in steps],
            student=self.student,
            optimizer=self.updater.optimizer,
            tell=lambda text: self._each_callback("on_note", text),
        )
        self.monitor.load_state_dict(then.monitor)
        self.state.policy_version += 1
        self.source.sync(computing_module(self.student), self.state.policy_version)
        self.accelerator.wait_for_everyone()

    def _update(self, batch: StepBatch, controls: Controls) -> dict[str, float]:
        """All optimizer updates of a step; returns their mean figures."""
        objective = self.config.objective.with_coefs(gold=controls.gold_coef, reference=controls.reference_coef)
        self.updater.objective = objective
        pad_id = pad_token_id(self.tokenizer)
        parts: list[TrainingRows] = []
        metrics: dict[str, float] = {}
        late = batch.scores is not None and batch.teacher_logprobs is None
        if batch.rollouts is not None:
            signals, metrics = self._signals(batch)
            if self.config.rollout.pipeline:
                metrics["sampling/staleness"] = float(self.state.policy_version - batch.rollouts.policy_version)
            if controls.drop_loops:
                signals = without_loops(signals, batch.rollouts, self.monitor.settings)
            parts.append(rollout_rows(batch.rollouts, batch.scores, signals, batch.positions))
            if late:
                batch.teacher_logprobs = torch.zeros_like(batch.rollouts.sampling_logprobs)  # filled by the updates
        if objective.needs_gold:
            gold = self.data.gold(batch.step, self.data.stream.batch(batch.step))
            mine = [gold[position] for position in batch.positions]
            parts.append(gold_rows(mine, batch.positions, pad_id, self.accelerator.device))
        rows = concat_rows(parts, pad_id)
        rate = learning_rate_at(batch.step, self.config.optimizer, self.config.max_steps)
        figures = []
        key = [self.config.seed, _MINIBATCH_STREAM, batch.step]
        for minibatch in minibatches(rows, self.config.rollout.num_prompts, self.config.optimizer, key):
            figures.append(self.updater.update(minibatch, rate, batch.teacher_logprobs if late else None))
            self.state.policy_version += int(not figures[-1]["skipped_updates"])
        if batch.rollouts is not None and "sampling/logprob_gap" in figures[0]:
            # Later updates of a step see a policy that has moved on; the engine's own error shows in the first.
            metrics.setdefault("sampling/logprob_gap", figures[0]["sampling/logprob_gap"])
        return {**mean_of(figures), **metrics, "learning_rate": rate}

    def _signals(self, batch: StepBatch) -> tuple[RolloutSignals, dict[str, float]]:
        """Advantages and token weights of the rollouts; the gap to the engine where it is known beforehand."""
        assert batch.rollouts is not None
        objective, rollouts = self.config.objective, batch.rollouts
        scores = self.updater.score(rollouts, entropy=True) if objective.needs_student_scores else None
        signals = rollout_signals(
            rollouts,
            batch.scores,
            objective,
            rewards=None if batch.rewards is None else torch.tensor(batch.rewards, device=self.accelerator.device),
            student_scores=scores,
            special_ids=self.special_ids,
            gather=lambda array: [part.to(array.device) for part in gather_object([array.cpu()])],
            rank=self.accelerator.process_index,
        )
        if scores is None:
            return signals, {}
        gap = (scores.logprobs - rollouts.sampling_logprobs).abs()
        figures = {"sampling/logprob_gap": self._token_mean(gap, rollouts.completion_mask)}
        if objective.correction.kind != "none":
            outside = corrected_tokens(scores.logprobs, rollouts.sampling_logprobs, objective.correction)
            figures["sampling/corrected_fraction"] = self._token_mean(outside, rollouts.completion_mask)
        return signals, figures

    def _hindsight(self, batch: StepBatch) -> dict[str, float]:
        """What is known of a step's rollouts after its update; some of them are written to the run folder."""
        if batch.rollouts is None:
            return {}
        metrics = {"num_new_tokens": float(sum(gather_object(batch.rollouts.lengths())))}
        if batch.teacher_logprobs is not None:
            gap = batch.rollouts.sampling_logprobs - batch.teacher_logprobs
            mask = batch.rollouts.completion_mask
            metrics["teacher/reverse_kl"] = self._token_mean(gap, mask)
            metrics |= self._by_teacher(batch.rollouts, gap)
            metrics["teacher/logprob"] = self._token_mean(batch.teacher_logprobs, mask)
            metrics["sampling/logprob"] = self._token_mean(batch.rollouts.sampling_logprobs, mask)
        late = batch.teacher_logprobs is not None and batch.scores is not None and batch.scores.sampled_logprobs is None
        due = self._due(batch.step, self.config.logging.rollouts_every_steps) or batch.step == 1
        if late or due:
            views = gather_views(batch)
            if late:
                metrics |= self.monitor.advantage_figures(
                    [view.completion.token_ids for view in views], all_advantages(views) or []
                )
            if due and self.logbook and self.config.logging.num_rollouts:
                shown = views[: self.config.logging.num_rollouts]
                self.logbook.rollouts(batch.step, [view.to_json(batch.step, self.config.health) for view in shown])
        return metrics

    def _by_teacher(self, rollouts: RolloutBatch, gap: torch.Tensor) -> dict[str, float]:
        """`teacher/NAME/reverse_kl` of each of several teachers that had rollouts in this step."""
        metrics: dict[str, float] = {}
        for name in self.config.teachers if self.config.data.teacher_column else ():
            rows = torch.tensor([teacher == name for teacher in rollouts.teachers], device=gap.device)
            mean = self._token_mean(gap, rollouts.completion_mask & rows[:, None])
            if not math.isnan(mean):
                metrics[f"teacher/{name}/reverse_kl"] = mean
        return metrics

    def _token_mean(self, values: torch.Tensor, mask: torch.Tensor) -> float:
        """Mean of [B, T] values over the unmasked tokens of all processes; NaN where there is none."""
        local = torch.stack([(values * mask).sum().double(), mask.sum().double()])
        total = self.accelerator.reduce(local, reduction="sum")
        return float(total[0] / total[1])

    def _advance(self, step: int, metrics: dict[str, float], *, stopped: bool) -> None:
        self.state.step = step
        self.state.stopped = stopped
        self.state.num_tokens += int(metrics.pop("num_new_tokens", 0.0))
        self.state.prompt_cursor = self.data.stream.cursor(step)
        self.state.monitor = self.monitor.state_dict()
        self.state.controller = self.controller.state_dict()
        metrics["num_tokens"] = float(self.state.num_tokens)

    def _end_without_updates(self, step: int, metrics: dict[str, float]) -> None:
        """Raises: TrainingError when no update could be made for `MAX_STEPS_WITHOUT_UPDATE` steps in a row."""
        if "skipped_updates" not in metrics:  # a rollback or a stop took the update's place
            return
        idle = self.state.steps_without_update + 1 if metrics["skipped_updates"] == 1.0 else 0
        self.state.steps_without_update = idle
        if idle < MAX_STEPS_WITHOUT_UPDATE:
            return
        raise TrainingError(why_without_updates(step, idle, empty=metrics["skipped_updates/no_tokens"] > 0))

    # ------------------------------------------------------------------ run folder

    def _open_run_folder(self, resume: bool) -> None:
        path = self.config.run_dir
        if resume:
            check_resumable(path / "config.yaml", self.config)
        self.logbook = Logbook(self.config, self.accelerator, resume=resume)
        self.accelerator.wait_for_everyone()
        after_step = self._resume(path) if resume else None
        self.accelerator.wait_for_everyone()  # what a resuming process reads is rewritten next
        self.logbook.start(after_step)

    def _resume(self, path: Path) -> int | None:
        """Step of the checkpoint from which the run goes on; None when it was killed before its first one."""
        newest = newest_of_this_run(path / "checkpoints", self.state.begun_with)
        if newest is None:
            check_nothing_lost(path)
            return None
        self._tell_of_a_lost_log(path, newest.name)
        self.state = load_checkpoint(newest, student=self.student, optimizer=self.updater.optimizer)
        self.state.stopped = False
        self.monitor.load_state_dict(self.state.monitor)
        self.controller.load_state_dict(self.state.controller)
        self.source.sync(computing_module(self.student), self.state.policy_version)
        return self.state.step

    def _tell_of_a_lost_log(self, path: Path, checkpoint: str) -> None:
        if not (path / "metrics.jsonl").exists():
            self._each_callback(
                "on_note",
                f"{path / 'metrics.jsonl'} is gone: the run goes on from {checkpoint}, but its log until "
                "then is lost, and the report begins after it. With a copy: stop, put it back, and resume again",
            )

    def _log(self, step: int, metrics: dict[str, float], alerts: tuple[Alert, ...]) -> None:
        if self.config.health.actions == "off":
            alerts = ()
        if self.logbook:
            self.logbook.write(step, metrics, alerts)
        self._each_callback("on_step_end", {"step": step, **metrics}, alerts)

    def _save_if_due(self, step: int, metrics: dict[str, float]) -> None:
        settings = self.config.checkpoint
        accuracy = metrics.get(f"eval/{self.config.evaluation.name}/accuracy")
        best = accuracy is not None and (self.state.best_metric is None or accuracy > self.state.best_metric)
        if best:
            self.state.best_metric, self.state.best_step = accuracy, step
        if not (self._due(step, settings.every_steps) or (best and settings.keep_best) or self.state.stopped):
            return
        self.controller.saved(step, self.monitor.alarms)
        self.state.controller = self.controller.state_dict()
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
                keep_steps=self.controller.checkpoints_needed + self._best_step(),
            )
            self._each_callback("on_save", str(path))
        self.accelerator.wait_for_everyone()

    def _may_save(self, step: int) -> bool:
        """Whether a checkpoint may be written at the end of this step, as far as can be told at its start."""
        evaluated = self.data.is_evaluated and self._due(step, self.config.evaluation.every_steps)
        return self._due(step, self.config.checkpoint.every_steps) or (evaluated and self.config.checkpoint.keep_best)

    def _best_step(self) -> tuple[int, ...]:
        best = self.state.best_step if self.config.checkpoint.keep_best else None
        return () if best is None else (best,)

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.max_steps

    def _each_callback(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)


def _seed(*key: int) -> int:
    """A seed below 2^63 that depends on every part of the key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
