"""Names that were misspelt and what was probably meant; names that are folders."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def nearest(name: str, known: Collection[str]) -> str:
    """' (did you mean ...?)' by the whole dotted key, else by its last part."""
    leaf = name.rsplit(".", 1)[-1]
    by_leaf: dict[str, str] = {}
    for key in known:
        by_leaf.setdefault(key.rsplit(".", 1)[-1], key)
    whole = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    found = whole or [by_leaf[match] for match in difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.7)]
    return f" (did you mean {found[0]!r}?)" if found else ""


def is_a_path(model: str) -> bool:
    """Whether the name of a model can only be a folder: a hub id is one or two plain names."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model
