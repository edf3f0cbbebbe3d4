"""A completion ends with the very token after which its text holds a stop string."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_engine import END, Scripted, engine, prompts, qwen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stableopd.rollout.stops import StopWatch
from stableopd.types import Example, RolloutBatch, Sampling

CORPUS = [
    "the cat sat on the mat. ",
    "été déjà vu — naïve café 日本語 🙂🙂 ",
    "Question: what? \n\nAnswer: 42\n\n",
    "</s> ]]> ",
] * 4


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE: a character may be several tokens, a token several characters, or parts of two."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def spaced() -> PreTrainedTokenizerFast:
    """Words with a marker for the space before them, which decoding leaves out at the front; bytes for the rest."""
    words = ["<unk>", "▁the", "▁cat", "▁", "s", "▁s", "at", "▁stop", "stop", ".", "▁.", "he"]
    pieces = [*words, *[f"<0x{byte:02X}>" for byte in range(256)]]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


BYTES, SPACED = byte_level(), spaced()


def first_stop(ids: list[int], strings: list[str], tokenizer: Any) -> int | None:
    """Tokens up to the first after which the whole text holds a stop string, by decoding it anew each time."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if any(string in text for string in strings):
            return count
    return None


def watched(ids: list[int], strings: list[str], tokenizer: Any) -> int | None:
    watch, alive = StopWatch(1, strings, tokenizer), torch.tensor([True])
    for count, token in enumerate(ids, start=1):
        if bool(watch.push(torch.tensor([token]), alive)):
            return count
    return None


texts = st.text(st.sampled_from([*"the cat.\n?42]>", "é", "日", "🙂", "—", "à"]), min_size=1, max_size=4)


@given(
    st.lists(st.integers(0, len(BYTES) - 1), max_size=40),
    st.lists(st.one_of(texts, st.sampled_from(["\n\n", "the", "<end>", "🙂", "café"])), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_any_ids_of_a_byte_level_vocabulary_stop_where_their_whole_text_does(ids, strings):
    assert watched(ids, strings, BYTES) == first_stop(ids, strings, BYTES)


@given(st.text(st.sampled_from("the cat\né日🙂—?2."), max_size=30), texts, st.text(max_size=5), st.randoms())
@settings(max_examples=200, deadline=None)
def test_a_string_spelled_in_any_pieces_is_found(before, string, after, choose):
    """The text is cut at random bytes and each stretch is tokenised as far as it can be, so that pieces vary."""
    raw, ids = (before + string + after).encode(), []
    byte_ids = bytes_to_ids()
    while raw:
        length = choose.randint(1, 9)
        piece, raw = raw[:length], raw[length:]
        try:
            ids += BYTES.encode(piece.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            ids += [byte_ids[byte] for byte in piece]
    found = watched(ids, [string], BYTES)
    assert found is not None
    assert found == first_stop(ids, [string], BYTES)


def bytes_to_ids() -> dict[int, int]:
    """The single-byte token of each byte."""
    alphabet = {}
    for token, number in BYTES.get_vocab().items():
        if len(token) == 1:
            alphabet[token] = number
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + at) for at, byte in enumerate(hidden)}
    return {byte: alphabet[character] for byte, character in characters.items()}


@given(
    st.lists(st.integers(1, 11), max_size=20), st.sampled_from(["the", " the", " stop", "stop", " .", "s at", "sat"])
)
@settings(max_examples=200, deadline=None)
def test_spaces_that_depend_on_what_stands_before_are_as_in_the_whole_text(ids, string):
    assert watched(ids, [string], SPACED) == first_stop(ids, [string], SPACED)


def test_a_character_of_several_byte_tokens_is_found_when_it_is_complete():
    ids = [1, *[12 + byte for byte in "日本\n".encode()], 2]
    assert watched(ids, ["日本"], SPACED) == 7
    assert watched(ids, ["本\n"], SPACED) == 8


def test_what_a_token_costs_does_not_grow_with_the_completion():
    lengths = []

    class Spy(PreTrainedTokenizerFast):
        def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
            lengths.append(len(token_ids))
            return super().decode(token_ids, *args, **kwargs)

    spy = Spy(tokenizer_object=BYTES.backend_tokenizer)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, len(BYTES), (500,), generator=generator).tolist()
    assert watched(ids, ["never to be seen"], spy) is None
    assert max(lengths) <= 17
    assert len(lengths) <= 2 * 500


def test_rows_that_are_not_alive_are_not_looked_at_and_dropped_rows_take_their_text_along():
    the, cat = BYTES.encode("the")[0], BYTES.encode("cat", add_special_tokens=False)
    watch = StopWatch(3, ["thecat"], BYTES)
    assert watch.push(torch.tensor([the, the, cat[0]]), torch.tensor([True, True, True])).tolist() == [False] * 3
    watch.keep(torch.tensor([1, 2]))
    other = StopWatch(1, ["thecat"], BYTES)
    other.push(torch.tensor([the]), torch.tensor([True]))
    watch.join(other)
    for token in cat:
        found = watch.push(torch.tensor([token] * 3), torch.tensor([True, True, False]))
    assert found.tolist() == [True, False, False]


# ------------------------------------------------------------------------------------------------- in the engine


def letters() -> PreTrainedTokenizerFast:
    """Ids 0-31 are the letters from A on: what `Scripted` and the tiny models say can be read."""
    vocabulary = {chr(ord("A") + number): number for number in range(32)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="A"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def said(scripts: list[list[int]], strings: tuple[str, ...], **options: Any) -> RolloutBatch:
    model = Scripted({10 + at: script for at, script in enumerate(scripts)})
    examples = [Example(index=at, prompt="", prompt_ids=(10 + at, 20, 21)) for at in range(len(scripts))]
    sampling = Sampling(max_new_tokens=8, stop_strings=strings)
    return engine(model, tokenizer=letters(), **options).generate(examples, sampling, step=0)


@pytest.mark.parametrize("options", [{}, {"max_batch_size": 2, "compact_below": 1.0}, {"compact_below": 0.0}])
def test_a_rollout_keeps_the_tokens_of_its_stop_string_and_counts_as_stopped(options):
    scripts = [[5, 3, 4, 7, END], [2, 3, 3, 4, 4, 4], [7, 7, END], [4, 3, 5, 5, 5, 5, 5, 5, 5], [3, 4, 2]]
    found = said(scripts, ("DE", "HHH"), **options)
    assert found.completions() == [[5, 3, 4], [2, 3, 3, 4], [7, 7, END], [4, 3, 5, 5, 5, 5, 5, 5], [3, 4]]
    assert found.finish_reason == ("stop", "stop", "stop", "length", "stop")


def test_a_stop_string_on_the_last_allowed_place_is_a_stop():
    found = said([[5, 5, 5, 5, 5, 5, 3, 4], [4, 5, 5, 5, 5, 5, 5, 5]], ("DE",))
    assert found.finish_reason == ("stop", "length")
    assert found.lengths() == [8, 8]


def test_a_stop_string_in_the_prompt_or_across_its_end_stops_nothing():
    found = said([[5, 5, END]], ("UV", "VF", "V"))  # the prompt ends in UV, the completion begins with F
    assert found.completions() == [[5, 5, END]]


def test_stopped_rollouts_are_the_untouched_ones_cut_short_in_refilled_slots_too():
    model, examples, tokenizer = qwen(), prompts(3, 5, 4, 6), letters()
    sampling = {"max_new_tokens": 40, "num_generations": 4, "seed": 3}
    free = engine(model).generate(examples, Sampling(**sampling), step=1)
    strings = ["GH", "K", "NO"]
    cut = engine(model, tokenizer=tokenizer, max_batch_size=5).generate(
        examples, Sampling(**sampling, stop_strings=tuple(strings)), step=1
    )
    ends = [first_stop(whole, strings, tokenizer) for whole in free.completions()]
    assert sum(end is not None for end in ends) > 4
    for whole, part, end, reason, before in zip(
        free.completions(), cut.completions(), ends, cut.finish_reason, free.finish_reason, strict=True
    ):
        assert part == whole[:end]
        assert reason == ("stop" if end is not None else before)


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="tokenizer="):
        engine(qwen()).generate(prompts(3), Sampling(max_new_tokens=4, stop_strings=("x",)), step=0)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        engine(qwen(), tokenizer=letters()).generate(
            prompts(3), Sampling(max_new_tokens=4, stop_strings=("x", "")), step=0
        )
