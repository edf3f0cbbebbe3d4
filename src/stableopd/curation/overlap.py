"""Whether a prompt shares a stretch of words with a benchmark's prompt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

NGRAM = 13
MIN_NGRAM = 8
_CJK = "぀-ヿ㐀-鿿가-힯"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_SIGN_OR_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[-+*/^=<>!|]")

Reason = Literal["exact", "ngram", "contains", "contained"]
"""The same prompt; n words in a row in common; the whole (short) benchmark prompt inside; wholly inside of one."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """What a prompt has in common with a benchmark."""

    benchmark: str
    reason: Reason
    prompt: str
    """The benchmark's prompt, as it stands there."""
    words: str
    """The words in common, normalised."""


def words_of(text: str) -> tuple[str, ...]:
    """Letters and digits in a row, in lower case and compatibility form; no punctuation, no LaTeX signs.

    Chinese, Japanese and Korean characters count as a word each.
    """
    return tuple(_WORD.findall(_plain(text)))


def signed_words_of(text: str) -> tuple[str, ...]:
    """Words, and the arithmetic signs between them, which tell short prompts apart."""
    return tuple(_SIGN_OR_WORD.findall(_plain(text)))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


class OverlapIndex:
    """Looks prompts up among those of benchmarks; memory grows with the benchmarks alone.

    Args:
        benchmarks: prompts by the benchmark's name.
        ngram: words in a row that are too many to be chance.
        min_ngram: prompts of fewer words than `ngram`, on either side, match where they lie in the other as a whole,
            down to so many words; shorter ones match the same prompt only, arithmetic signs included.

    Holds: finds every prompt that has `ngram` words in a row, or a benchmark's whole prompt of `min_ngram` words or
        more, in common with a benchmark; never one that has no word in common with any.
    """

    def __init__(self, benchmarks: Mapping[str, Iterable[str]], *, ngram: int = NGRAM, min_ngram: int = MIN_NGRAM):
        if not 1 <= min_ngram <= ngram:
            raise ValueError(f"min_ngram must be in [1, ngram], got {min_ngram} with ngram={ngram}")
        self.ngram, self.min_ngram = ngram, min_ngram
        self._prompts: list[tuple[str, str]] = []
        """(benchmark, prompt), which the tables below point into."""
        self._exact: dict[tuple[str, ...], int] = {}
        self._grams: dict[int, dict[tuple[str, ...], int]] = {}
        """By number of words: stretches of that length, of prompts whose longest needed stretch it is."""
        self._starts: dict[tuple[str, ...], list[tuple[int, tuple[str, ...]]]] = {}
        """Stretches of `min_ngram` words, with the words that follow up to `ngram`: where a short prompt may lie."""
        for name, prompts in benchmarks.items():
            for prompt in prompts:
                self._add(name, prompt)

    def __len__(self) -> int:
        return len(self._prompts)

    def _add(self, name: str, prompt: str) -> None:
        number, words = len(self._prompts), words_of(prompt)
        self._prompts.append((name, prompt))
        if signs := signed_words_of(prompt):
            self._exact.setdefault(signs, number)
        size = min(self.ngram, len(words))
        if size >= self.min_ngram:
            table = self._grams.setdefault(size, {})
            for gram in _windows(words, size):
                table.setdefault(gram, number)
        for start in range(len(words) - self.min_ngram + 1):
            stretch = words[start : start + self.ngram]
            self._starts.setdefault(stretch[: self.min_ngram], []).append((number, stretch[self.min_ngram :]))

    def match(self, prompt: str) -> Match | None:
        """What the prompt has in common with a benchmark; None: nothing that counts."""
        exact = self._exact.get(signed_words_of(prompt))
        if exact is not None:
            return self._found(exact, "exact", words_of(prompt))
        words = words_of(prompt)
        for size, table in sorted(self._grams.items(), reverse=True):
            for gram in _windows(words, size):
                if gram in table:
                    return self._found(table[gram], "ngram" if size == self.ngram else "contains", gram)
        if self.min_ngram <= len(words) < self.ngram:
            rest = words[self.min_ngram :]
            for number, following in self._starts.get(words[: self.min_ngram], ()):
                if following[: len(rest)] == rest:
                    return self._found(number, "contained", words)
        return None

    def _found(self, number: int, reason: Reason, words: Sequence[str]) -> Match:
        benchmark, prompt = self._prompts[number]
        return Match(benchmark=benchmark, reason=reason, prompt=prompt, words=" ".join(words))


def _windows(words: tuple[str, ...], size: int) -> Iterator[tuple[str, ...]]:
    return (words[start : start + size] for start in range(len(words) - size + 1))
