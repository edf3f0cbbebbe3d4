"""The tokenizer learns the world's words, reads back any text, and its template opens the thinking."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer

from stableopd.vocabulary import answer_end_id, end_token_ids, vocab_size
from stableopd.words.build import build_tokenizer, messages
from stableopd.words.problems import draw_problem
from stableopd.words.settings import PRESETS
from stableopd.words.tokenizer import END

PRESET = PRESETS["quick"]


@cache
def trained_once():
    return build_tokenizer(PRESET)


@pytest.fixture
def words():
    return trained_once()


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_reads_back(text):
    tokenizer = trained_once()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_of_the_world_are_single_tokens(words):
    problem = draw_problem(PRESET.world.problems, np.random.default_rng(0))
    ids = words(problem.text)["input_ids"]
    assert len(ids) < 0.4 * len(problem.text)
    for word in ("Wait", " again", " plums", " 12", "</think>", "<think>", END):
        assert len(words(word)["input_ids"]) == 1, word


def test_its_size_is_the_one_asked_for(words):
    assert vocab_size(words) == len(words) <= PRESET.vocab_size


def test_the_template_marks_turns_and_opens_the_thinking(words):
    problem = draw_problem(PRESET.world.problems, np.random.default_rng(1))
    chat = messages(problem)
    prompt = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == f"<|user|>{problem.text}<|end|><|assistant|><think>\n"
    whole = words.apply_chat_template([*chat, {"role": "assistant", "content": "<think>\nSo"}], tokenize=False)
    assert whole == prompt + "So<|end|>"
    with pytest.raises(TemplateError, match="user and assistant"):
        words.apply_chat_template([{"role": "system", "content": "Be brief"}], tokenize=False)


def test_a_turn_ends_in_eos_and_padding_is_another_token(words):
    assert words.eos_token == END
    assert answer_end_id(words, chat=True) == answer_end_id(words, chat=False) == words.eos_token_id
    assert end_token_ids(words, None) == {words.eos_token_id}
    assert words.pad_token_id != words.eos_token_id


def test_it_is_the_same_when_trained_again_and_when_saved_and_loaded(words, tmp_path):
    words.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    again = build_tokenizer(PRESET)
    assert words.get_vocab() == again.get_vocab() == loaded.get_vocab()
    assert loaded.chat_template == words.chat_template
    text = "<think>\n5 + 3 = 8.\n</think>\n\\boxed{8}<|end|>"
    assert loaded(text)["input_ids"] == words(text)["input_ids"]
