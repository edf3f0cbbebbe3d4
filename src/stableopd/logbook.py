"""Where a run's figures and alerts go: the run folder, trackers, and whoever wants to be told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from accelerate import Accelerator

from stableopd.config import StableOPDConfig
from stableopd.config_files import dump_config, flatten
from stableopd.metrics import TrackerSink
from stableopd.notify import Notifier
from stableopd.protocols import MetricSink
from stableopd.recorder import RunRecorder
from stableopd.types import Alert


class Logbook:
    """Everything that is written while a run goes, but for checkpoints. Only the main process writes to the run folder.

    Raises: RunFolderError when the run folder is occupied or locked.
    """

    def __init__(self, config: StableOPDConfig, accelerator: Accelerator, *, resume: bool) -> None:
        self.config = config
        self._accelerator = accelerator
        self._recorder = RunRecorder(config.run_dir, resume=resume) if accelerator.is_main_process else None
        self._notifier: Notifier | None = None
        self._sinks: list[MetricSink] = []

    def start(self, after_step: int | None) -> None:
        """Begin to write, keeping what is there up to `after_step` (None: nothing)."""
        if self._recorder:
            self._recorder.start(dump_config(self.config), after_step)
            if self.config.health.notify:
                self._notifier = self.config.health.notify.notifier(self.config.run_dir.resolve().name)
        if self.config.logging.report_to:
            settings = flatten(self.config.model_dump(mode="json"))
            self._sinks.append(TrackerSink(self._accelerator, "stableopd", settings))

    def write(self, step: int, metrics: Mapping[str, float], alerts: tuple[Alert, ...]) -> None:
        """A step's figures and alerts."""
        if self._recorder:
            self._recorder.metrics(step, metrics)
            self._recorder.alerts(alert.to_json() for alert in alerts)
        if self._notifier:
            self._notifier.send(alerts)
        for sink in self._sinks:
            sink.write(step, metrics)

    def rollouts(self, step: int, rollouts: Iterable[Mapping[str, Any]]) -> None:
        """Some rollouts of a step."""
        if self._recorder:
            self._recorder.rollouts(step, rollouts)

    def close(self) -> None:
        """Let go of the run folder; messages that are on their way get a moment."""
        if self._notifier:
            self._notifier.close()
        for sink in self._sinks:
            sink.close()
        if self._recorder:
            self._recorder.close()
