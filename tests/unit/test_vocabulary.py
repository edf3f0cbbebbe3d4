"""Which ids end an answer, which pad, and whether two models share a vocabulary."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stableopd.errors import ModelError
from stableopd.vocabulary import (
    VocabularyWarning,
    answer_end_id,
    check_same_vocabulary,
    end_token_ids,
    pad_token_id,
    turn_end_id,
    vocab_size,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEXT_SPEAKER_ENDS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SPACED = "{% for m in messages %}{{ m.role }}: {{ m.content }} \n </s>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<s>", "</s>"]
LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]


def make_tokenizer(letters=LETTERS, special=SPECIAL, chat_template=None, **names):
    backend = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def chatml(**names):
    return make_tokenizer(chat_template=CHATML, **{"eos_token": "<|endoftext|>", **names})


def id_of(tokenizer, token):
    return tokenizer.convert_tokens_to_ids(token)


def test_an_answer_ends_at_eos_at_the_end_of_a_turn_and_at_every_configured_id():
    tokenizer = chatml()
    ends = end_token_ids(tokenizer, SimpleNamespace(eos_token_id=[id_of(tokenizer, "</s>"), 3]))
    assert ends == {id_of(tokenizer, token) for token in ("<|endoftext|>", "<|im_end|>", "</s>")} | {3}


@pytest.mark.parametrize("configured", [7, [7], None])
def test_a_generation_config_may_name_one_end_several_or_none(configured):
    tokenizer = make_tokenizer(eos_token="</s>")
    ends = end_token_ids(tokenizer, SimpleNamespace(eos_token_id=configured))
    assert ends == {id_of(tokenizer, "</s>")} | ({7} if configured else set())


def test_id_zero_is_an_end_token_like_any_other():
    assert 0 in end_token_ids(make_tokenizer(eos_token="</s>"), SimpleNamespace(eos_token_id=0))


def test_a_tokenizer_without_eos_still_ends_where_its_turns_end():
    tokenizer = make_tokenizer(chat_template=CHATML)
    assert end_token_ids(tokenizer) == {id_of(tokenizer, "<|im_end|>")}


def test_a_tokenizer_that_ends_nothing_is_refused_with_what_to_do():
    with pytest.raises(ModelError, match=r"no EOS token.*Set tokenizer\.eos_token.*generation_config\.json"):
        end_token_ids(make_tokenizer(chat_template=PLAIN))


def test_a_turn_ends_in_the_special_token_right_after_the_assistants_content():
    tokenizer = chatml()
    assert turn_end_id(tokenizer) == id_of(tokenizer, "<|im_end|>")


def test_white_space_may_stand_before_the_end_of_a_turn():
    tokenizer = make_tokenizer(chat_template=SPACED)
    assert turn_end_id(tokenizer) == id_of(tokenizer, "</s>")


def test_where_a_conversation_just_stops_the_next_speaker_ends_the_turn():
    tokenizer = make_tokenizer(chat_template=NEXT_SPEAKER_ENDS, eos_token="<|endoftext|>")
    assert turn_end_id(tokenizer) == id_of(tokenizer, "<|user|>")


@pytest.mark.parametrize("template", [None, PLAIN, PLAIN + "the end</s>", "nothing of the messages </s>"])
def test_no_end_of_turn_is_made_up(template):
    assert turn_end_id(make_tokenizer(chat_template=template, eos_token="</s>")) is None


def test_a_chat_template_that_cannot_be_rendered_is_named_as_the_culprit():
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('only for tools') }}", eos_token="</s>")
    with pytest.raises(ModelError, match=r"only for tools.*Correct tokenizer\.chat_template"):
        end_token_ids(tokenizer)


def test_gold_ends_in_the_turn_end_after_chat_and_in_eos_after_text():
    tokenizer = chatml()
    assert answer_end_id(tokenizer, chat=True) == id_of(tokenizer, "<|im_end|>")
    assert answer_end_id(tokenizer, chat=False) == id_of(tokenizer, "<|endoftext|>")


def test_gold_falls_back_on_eos_where_turns_have_no_end():
    tokenizer = make_tokenizer(chat_template=PLAIN, eos_token="</s>")
    assert answer_end_id(tokenizer, chat=True) == id_of(tokenizer, "</s>")


def test_gold_for_text_cannot_be_ended_without_eos():
    with pytest.raises(ModelError, match=r"text prompts.*Set tokenizer\.eos_token"):
        answer_end_id(make_tokenizer(chat_template=CHATML), chat=False)


def test_padding_takes_the_pad_token_then_eos_then_the_end_of_a_turn():
    padded, unpadded, chat_only = chatml(pad_token="<s>"), chatml(), make_tokenizer(chat_template=CHATML)
    assert pad_token_id(padded) == id_of(padded, "<s>")
    assert pad_token_id(unpadded) == id_of(unpadded, "<|endoftext|>")
    assert pad_token_id(chat_only) == id_of(chat_only, "<|im_end|>")


def test_vocabulary_size_counts_added_tokens():
    assert vocab_size(chatml()) == len(LETTERS) + len(SPECIAL)


def test_equal_vocabularies_pass():
    check_same_vocabulary(chatml(), make_tokenizer(eos_token="</s>"))


def test_moved_tokens_are_counted_and_the_first_are_named_with_both_ids():
    swapped = [LETTERS[1], LETTERS[0], *LETTERS[2:]]
    with pytest.raises(ModelError, match=r"2 have another id: ' ' \(0 / 1\), '!' \(1 / 0\)"):
        check_same_vocabulary(make_tokenizer(), make_tokenizer(swapped))


def test_missing_tokens_are_reported_on_the_side_that_lacks_them():
    with pytest.raises(ModelError) as caught:
        check_same_vocabulary(
            make_tokenizer([*LETTERS, "student"]), make_tokenizer([*LETTERS, "teacher"]), teacher_name="teacher 'math'"
        )
    message = str(caught.value)
    assert f"1 are unknown to the teacher 'math': 'student' ({len(LETTERS)})" in message
    assert f"1 are unknown to the student: 'teacher' ({len(LETTERS)})" in message


def test_a_family_that_renames_its_added_tokens_is_a_pair_with_a_warning():
    student = make_tokenizer(special=[*SPECIAL, "<|im_sep|>"])
    teacher = make_tokenizer(special=[*SPECIAL, "<turn>"])
    with pytest.warns(VocabularyWarning, match=r"2 added tokens differ .*'<turn>'"):
        check_same_vocabulary(student, teacher)


def test_only_the_first_differences_are_listed_but_all_are_counted():
    with pytest.raises(ModelError, match=r"94 are unknown to the teacher: .* and 89 more") as caught:
        check_same_vocabulary(make_tokenizer(), make_tokenizer([*LETTERS[95:], " "]))
    assert len(str(caught.value)) < 1200
