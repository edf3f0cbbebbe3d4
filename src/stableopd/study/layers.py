"""Settings laid over each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stableopd.config import FLAT_NAMES


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings laid over each other, later ones on top. Flat and dotted names may be used in every layer."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            _lay(result, FLAT_NAMES.get(key, key).split("."), value)
    return result


def _lay(node: dict[str, Any], path: list[str], value: Any) -> None:
    *parents, leaf = path
    for parent in parents:
        child = node.get(parent)
        node[parent] = child = dict(child) if isinstance(child, Mapping) else {}
        node = child
    if isinstance(value, Mapping) and isinstance(node.get(leaf), Mapping):
        inner = dict(node[leaf])
        for key, item in value.items():
            _lay(inner, key.split("."), item)
        node[leaf] = inner
    else:
        node[leaf] = value
