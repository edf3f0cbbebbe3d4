"""One side of a pair, as far as it is known without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stableopd.errors import ModelError
from stableopd.vocabulary import end_token_ids, turn_end_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_SHOWN = 120


@dataclass(frozen=True, kw_only=True)
class Side:
    """A student or a teacher: its tokenizer and configurations. What is not known is None."""

    name: str
    """How findings call it: student, teacher, or teacher and its name."""
    tokenizer: PreTrainedTokenizerBase | None = None
    model_config: Any = None
    generation_config: Any = None

    @property
    def end_ids(self) -> frozenset[int]:
        """Every id that ends an answer; empty where none does or a broken chat template hides it."""
        if self.tokenizer is None:
            return frozenset()
        try:
            return end_token_ids(self.tokenizer, self.generation_config)
        except ModelError:
            return frozenset()

    def main_end(self, *, chat: bool) -> int | None:
        """The id that this side ends an answer with by habit: the end of a turn after a chat, EOS after a text."""
        assert self.tokenizer is not None
        try:
            turn = turn_end_id(self.tokenizer) if chat else None
        except ModelError:  # a template that cannot be rendered; the check of templates tells
            turn = None
        return turn if turn is not None else self.tokenizer.eos_token_id

    @property
    def num_embeddings(self) -> int | None:
        """Rows of the embedding, as the configuration says."""
        if self.model_config is None:
            return None
        config = self.model_config.get_text_config() if hasattr(self.model_config, "get_text_config") else None
        rows = getattr(config or self.model_config, "vocab_size", None)
        return int(rows) if rows else None

    def named(self, ids: Any) -> str:
        """Ids with their tokens, for evidence: '</s>' (2), '<|im_end|>' (5)."""
        assert self.tokenizer is not None
        return ", ".join(f"{self.tokenizer.convert_ids_to_tokens(int(token))!r} ({token})" for token in sorted(ids))


def short(text: str, length: int = LONGEST_SHOWN) -> str:
    """The text as Python writes it, cut in the middle where it is long."""
    if len(text) > length:
        text = text[: length // 2] + " … " + text[-length // 2 :]
    return repr(text)


def spread(rows: Any, most: int) -> list[Any]:
    """At most `most` of the rows, evenly over all of them."""
    rows = list(rows)
    if len(rows) <= most:
        return rows
    return [rows[position * len(rows) // most] for position in range(most)]
