"""What is watched in a run, who is told, and what the controller may do."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from stableopd.health.controller import Actions, ControllerSettings
from stableopd.health.monitor import MonitorSettings
from stableopd.names import nearest
from stableopd.notify import TIMEOUT_S, Notifier, url_problem
from stableopd.sections import NonNegative, NonNegativeInt, Positive, PositiveInt, Section
from stableopd.types import Severity


class ControllerConfig(Section):
    """Bounds of what the controller does; see docs/health.md."""

    max_gold_coef: NonNegative = 4.0
    max_reference_coef: NonNegative = 1.0
    cooldown_steps: PositiveInt = 10
    calm_steps: PositiveInt = 20
    max_rollbacks: NonNegativeInt = 3
    drop_loops: bool = False
    shorten_budget: bool = False


class NotifyConfig(Section):
    """Who is told of alerts while the run goes: a webhook, a command, or both; see docs/watching.md."""

    url: SecretStr | None = None
    """Written to config.yaml and to trackers as asterisks. Better is `url_env`."""
    url_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Name of the environment variable that holds the URL."""
    command: tuple[str, ...] = ()
    """Program and arguments; no shell. The alert is JSON on its standard input."""
    min_severity: Severity = "warning"
    timeout_s: Positive = TIMEOUT_S

    @model_validator(mode="after")
    def _somebody_is_told(self) -> Self:
        if self.url is None and self.url_env is None and not self.command:
            raise ValueError("it tells nobody: set url_env, url or command")
        if self.url is not None and self.url_env is not None:
            raise ValueError("url and url_env are the same setting; give one of them")
        problem = url_problem(self.url.get_secret_value()) if self.url is not None else None
        if problem:
            raise ValueError(f"url {problem} (the URL is not shown, and a run folder's config.yaml does not hold it)")
        return self

    def notifier(self, run_name: str) -> Notifier:
        return Notifier(
            run_name,
            url=self.url.get_secret_value() if self.url is not None else None,
            url_env=self.url_env,
            command=self.command,
            min_severity=self.min_severity,
            timeout_s=self.timeout_s,
        )


class HealthConfig(Section):
    """Thresholds of the monitor; see docs/run_folder.md and `stableopd.health.MonitorSettings`."""

    max_expected_length: PositiveInt | None = None
    tail_chars: PositiveInt = 10_000
    compression_threshold: Positive = 10.0
    actions: Actions = "warn"
    """What an alarm leads to: nothing (`off`), alerts (`warn`), stronger stabilisation (`stabilise`), also a return to
    an earlier checkpoint (`rollback`), or the end of the run (`stop`)."""
    controller: ControllerConfig = ControllerConfig()
    probe_prompts: NonNegativeInt = 16
    """Golden solutions whose ending the student is asked for at each step; 0: none."""
    thresholds: dict[str, float] = Field(default_factory=dict)
    """Any other field of MonitorSettings, by name."""
    overlap_topk: NonNegativeInt = 0
    """Compare the likeliest tokens of student and teacher, so many of each, at every token: costs one forward pass of
    the student; 0: not. Where the loss takes the teacher's top-k, their number is that of objective.distill.topk."""
    notify: NotifyConfig | None = None

    @field_validator("actions", mode="before")
    @classmethod
    def _off_is_a_word(cls, given: Any) -> Any:
        return "off" if given is False else given  # YAML reads off as false

    @model_validator(mode="after")
    def _settings_are_possible(self) -> Self:
        self.monitor_settings()
        return self

    @property
    def may_stabilise(self) -> bool:
        """Whether golden solutions and the initial student are needed even where no term asks for them."""
        return self.controller_settings().may_stabilise

    def controller_settings(self) -> ControllerSettings:
        return ControllerSettings(actions=self.actions, **self.controller.model_dump())

    def monitor_settings(self) -> MonitorSettings:
        known = {name for name in MonitorSettings.__dataclass_fields__ if name not in type(self).model_fields}
        for name in self.thresholds:
            if name not in known:
                raise ValueError(
                    f"thresholds has no entry {name!r}{nearest(name, known)}; known: {', '.join(sorted(known))}"
                )
        return MonitorSettings(
            max_expected_length=self.max_expected_length,
            tail_chars=self.tail_chars,
            compression_threshold=self.compression_threshold,
            **self.thresholds,  # type: ignore[arg-type]
        )
