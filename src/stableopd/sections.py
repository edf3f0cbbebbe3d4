"""What every section of a configuration is made of: numbers with bounds, and a model that refuses unknown keys."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
COLDEST = 1e-6
"""Temperatures between 0, which is greedy, and this one make figures that are not finite of logits."""
LONGEST_JUDGEMENT_S = 1_000_000.0
Temperature = Annotated[float, Field(ge=COLDEST, allow_inf_nan=False)]
JudgeTime = Annotated[float, Field(ge=0.1, le=LONGEST_JUDGEMENT_S)]
AtLeastOne = Annotated[float, Field(ge=1.0, allow_inf_nan=False)]


def _as_folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
        raise ValueError("a name becomes a folder: a letter or digit first, then letters, digits and any of _ . + -")
    return name


FolderName = Annotated[str, AfterValidator(_as_folder_name)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def changed(self) -> list[str]:
        """Names of the settings that are not at their defaults."""
        fields = type(self).model_fields.items()
        return [name for name, field in fields if getattr(self, name) != field.get_default(call_default_factory=True)]
