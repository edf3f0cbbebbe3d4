"""Configurations as files: YAML with line numbers in every complaint, overrides, and what a resumed run may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from stableopd.config import FLAT_NAMES, ControllerConfig, StableOPDConfig, holds_secrets, set_path
from stableopd.errors import ConfigError

Kind = TypeVar("Kind")

_MAY_CHANGE_ON_RESUME = {"max_steps", "checkpoint", "logging", "output_dir", "num_processes", "doctor"}
_MAY_CHANGE_ON_RESUME |= {"optimizer.micro_batch_tokens"}  # changes rounding only
_MAY_CHANGE_ON_RESUME |= {"student.lora.merge"}  # changes what is written at the end only
_MAY_CHANGE_ON_RESUME |= {"health.actions", *(f"health.controller.{name}" for name in ControllerConfig.model_fields)}
_MAY_CHANGE_ON_RESUME |= {"health.notify"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StableOPDConfig:
    """The configuration in a YAML file, with `dotted.key=value` overrides laid over it.

    Raises: ConfigError for a missing file, broken YAML, a duplicate or unknown key, a wrong type or an
    impossible value; the message has the line of the file where there is one.
    """
    raw, lines = read_yaml(Path(path))
    return laid_over(StableOPDConfig, raw, lines, overrides, path)


def config_of(overrides: Sequence[str]) -> StableOPDConfig:
    """The configuration of `dotted.key=value` settings alone. Raises: ConfigError as `load_config`."""
    return laid_over(StableOPDConfig, {}, {}, overrides, "command line")


def laid_over(
    kind: type[Kind], raw: dict[str, Any], lines: Mapping[str, int], overrides: Sequence[str], path: str | Path
) -> Kind:
    """The settings `raw` of a file, with overrides laid over them, as a `kind` of configuration.

    Args: `lines` has the line of each dotted key. Raises: ConfigError as `load_config`.
    """
    given: dict[str, str] = {}
    for override in overrides:
        dotted = _apply_override(raw, override)
        given[dotted] = override
        lines = {key: line for key, line in lines.items() if FLAT_NAMES.get(key, key) != dotted}
    try:
        return kind(**raw)
    except ConfigError as error:
        raise ConfigError("\n".join(_placed(error, path, lines, given))) from None


def check_resumable(path: Path, config: StableOPDConfig) -> None:
    """Whether a run whose configuration is stored at `path` may go on with `config`; a missing file is fine.

    Raises: ConfigError naming every setting that differs, but for those that do not touch what was done.
    """
    if not path.exists():
        return
    stored = flatten(read_yaml(path)[0])
    now = flatten(yaml.safe_load(dump_config(config)))
    fixed = () if config.optimizer.schedule == "constant" else ("max_steps",)
    changed = [
        f"{key}: {stored.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(stored.keys() | now.keys())
        if (key in fixed or not _with_parents(key) & _MAY_CHANGE_ON_RESUME) and stored.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{path.parent} was begun with another configuration and cannot go on with this one: "
            f"{'; '.join(changed)}. Put the old values back, or choose another output_dir"
        )


def _with_parents(key: str) -> set[str]:
    parts = key.split(".")
    return {".".join(parts[:depth]) for depth in range(1, len(parts) + 1)}


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def dump_config(config: StableOPDConfig) -> str:
    """The whole configuration as YAML, every default spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line of each of its dotted keys. Raises: ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a UTF-8 text file: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_key_lines(node, path)) if node is not None else {}
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}{_yaml_problem(error)}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values, not a {type(raw).__name__}")
    return raw, lines


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{where}: broken YAML: {getattr(error, 'problem', None) or error}"


def _key_lines(node: yaml.Node, path: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{path}, line {line}: the key {prefix + key!r} is not a name; keys are words")
        if key in seen:
            raise ConfigError(f"{path}, line {line}: the key {prefix + key!r} is given twice; remove one of them")
        seen.add(key)
        yield prefix + key, line
        yield from _key_lines(value_node, path, f"{prefix}{key}.")


def _apply_override(raw: dict[str, Any], override: str) -> str:
    """Lay one override over the settings; returns the dotted key that it sets."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, such as optimizer.learning_rate=1e-6")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}{_yaml_problem(error)}") from None
    dotted = FLAT_NAMES.get(key, key)
    for name, target in FLAT_NAMES.items():
        if target == dotted:
            raw.pop(name, None)
    set_path(raw, dotted, value, why=f"override {override!r}")
    return dotted


def _placed(
    error: ConfigError, path: str | Path, lines: Mapping[str, int], overrides: Mapping[str, str]
) -> Iterator[str]:
    """Each problem with the override that caused it, or the file and the line that its key stands on."""
    for dotted, message in error.problems:
        guilty = [text for key, text in overrides.items() if _is_within(dotted, key)]
        if guilty:
            shown = guilty[-1].partition("=")[0] if holds_secrets(dotted) else guilty[-1]
            yield f"{shown} (command line): {message.removeprefix(f'{dotted}: ')}"
            continue
        involved = [text for key, text in overrides.items() if dotted and _is_within(key, dotted)]
        beside = f" with {' '.join(involved)} (command line)" if involved else ""
        flat = next((name for name, target in FLAT_NAMES.items() if target == dotted and name in lines), dotted)
        line = lines.get(flat)
        yield f"{path}, line {line}{beside}: {message}" if line else f"{path}{beside}: {message}"


def _is_within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")
