"""Reading data, tokenising it, and drawing from it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stableopd.data import load_examples, read_rows
from stableopd.drawing import GoldPool, PromptStream
from stableopd.errors import DataError, MissingDependencyError, ModelError
from stableopd.types import Example

CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def chatml():
    """A small byte-level BPE whose EOS is not what ends a turn."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the answer is 42 and the question is user assistant"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def llama_like():
    """A character a token; writes <s> before and </s> behind a text, and <s> in its chat template too."""
    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789 \n?!")}
    backend = Tokenizer(models.WordLevel(letters))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    )
    return tokenizer


def load(rows, tokenizer, **options):
    return load_examples(rows, tokenizer, **{"source": "rows", **options})


def user(content):
    return [{"role": "user", "content": content}]


def assistant(content, **more):
    return [{"role": "assistant", "content": content, **more}]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refusal(call, *arguments, **options):
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# --- Reading ---------------------------------------------------------------------------------------


def test_jsonl_is_read_without_its_blank_lines_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"prompt": "a\xc3\xa9"}\r\n\n   \n{"prompt": "b\xe2\x80\xa8c"}')
    assert read_rows(path) == [{"prompt": "aé"}, {"prompt": "b\u2028c"}]


def test_a_row_remembers_its_line_past_blank_ones(tmp_path, chatml):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n\n{"prompt": 3}\n')
    assert f"{path}, line 3: 'prompt' is a number" in refusal(load, read_rows(path), chatml)


def test_a_json_list_is_read(tmp_path):
    path = write(tmp_path / "a.json", '[{"prompt": "a"},\n {"prompt": "b"}]')
    assert read_rows(path) == [{"prompt": "a"}, {"prompt": "b"}]


def test_parquet_is_read(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": user("a"), "gold": "x"}, {"prompt": user("b"), "gold": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet")) == rows


def test_what_is_not_parquet_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    assert "is not a Parquet file" in refusal(read_rows, write(tmp_path / "a.parquet", "prompt,gold"))


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow", "a.parquet"), ("datasets", "someone/something")], ids=["parquet", "hub"]
)
def test_a_missing_package_is_named_with_how_to_install_it(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    path = write(tmp_path / name, "x") if name.endswith("parquet") else name
    with pytest.raises(MissingDependencyError, match=rf"{package}.*pip install 'stableopd\[data\]'"):
        read_rows(path)


def test_jsonl_needs_neither_datasets_nor_pyarrow_nor_torch(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n')
    code = (
        "import sys; from stableopd.data import read_rows; assert len(read_rows(sys.argv[1])) == 1;"
        "print([name for name in ('datasets', 'pyarrow', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_is_read_file_by_file_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".cache").mkdir()
    write(tmp_path / "deep" / "c.json", '[{"prompt": "c"}]')
    write(tmp_path / "b.jsonl", '{"prompt": "b"}')
    write(tmp_path / "a.jsonl", '{"prompt": "a"}')
    write(tmp_path / "README.md", "# not data")
    write(tmp_path / ".cache" / "a.json", "{}")
    rows = read_rows(str(tmp_path))
    assert [row["prompt"] for row in rows] == ["a", "b", "c"]
    assert str(rows.places[1]) == f"{tmp_path / 'b.jsonl'}, line 1"


def test_a_split_chooses_among_the_files_of_a_folder(tmp_path):
    for name in ("train.jsonl", "train-00001.jsonl", "training.jsonl", "test.jsonl"):
        write(tmp_path / name, json.dumps({"prompt": name}))
    assert {row["prompt"] for row in read_rows(str(tmp_path), "train")} == {"train.jsonl", "train-00001.jsonl"}
    message = refusal(read_rows, str(tmp_path), "dev")
    assert "split 'dev'" in message
    assert "test.jsonl" in message


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(str(tmp_path / "saved"))
    assert read_rows(str(tmp_path / "saved")) == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": }\n', "a.jsonl, line 3, column 12 is not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ' + "[" * 100_000, "a.jsonl, line 2 cannot be read as JSON"),
        ("a.jsonl", '{"prompt": "a", "answer": ' + "9" * 5_000 + "}", "a.jsonl, line 1 cannot be read as JSON"),
        ("a.jsonl", '{"prompt": "a"}\n["prompt"]\n', "a.jsonl, line 2 is a list, not an object"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "a.jsonl, line 2 is not UTF-8 (byte 0xe9)"),
        ("a.json", '[{"prompt": "a"},\n{"prompt" "b"}]', "a.json, line 2, column 11 is not JSON"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', "If it holds one object per line, name it .jsonl"),
        ("a.json", b'[{"prompt": "a"},\n{"prompt": "\xff"}]', "a.json, line 2 is not UTF-8 (byte 0xff)"),
        ("a.json", '{"data": []}', "a.json holds an object where a list of rows is needed"),
        ("a.json", '[{"prompt": "a"}, null]', "a.json, row 2 is null, not an object"),
        ("a.jsonl", "\n \n", "a.jsonl holds no rows"),
        ("a.json", "[]", "a.json holds no rows"),
        ("a.csv", "prompt\na", "only .jsonl, .json or .parquet can be read"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path, name, content, expected):
    assert expected in refusal(read_rows, write(tmp_path / name, content))


def test_an_empty_folder_is_refused(tmp_path):
    assert "holds no .jsonl, .json or .parquet file" in refusal(read_rows, str(tmp_path))


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: records what is asked for, answers with `hub.answer` or raises it."""
    datasets = pytest.importorskip("datasets")

    class Hub:
        calls: list = []  # noqa: RUF012
        answer = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])

    def load_dataset(*arguments, **options):
        Hub.calls.append((arguments, options))
        if isinstance(Hub.answer, Exception):
            raise Hub.answer
        return Hub.answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return Hub


@pytest.mark.parametrize(
    "path", ["./data", "/no/where", "~/data", "a/b/c", "train.jsonl", "data/train.parquet", "x.csv"]
)
def test_what_looks_local_is_never_looked_up_on_the_hub(hub, path):
    assert "does not exist" in refusal(read_rows, path)
    assert hub.calls == []


@pytest.mark.parametrize("path", ["someone/math-v1.5", "math"])
def test_anything_else_is_a_hub_id_and_its_code_is_never_trusted(hub, path):
    assert read_rows(path, "train") == [{"prompt": "a"}, {"prompt": "b"}]
    assert hub.calls == [((path,), {"split": "train"})]


def test_a_colon_names_the_configuration_on_the_hub(hub):
    read_rows("someone/math:main", "test")
    assert hub.calls == [(("someone/math", "main"), {"split": "test"})]


def test_the_only_split_is_taken_and_several_must_be_chosen_from(hub):
    import datasets

    table = hub.answer
    hub.answer = datasets.DatasetDict(train=table)
    assert len(read_rows("someone/math")) == 2
    hub.answer = datasets.DatasetDict(train=table, test=table)
    assert "splits train, test. Set data.split" in refusal(read_rows, "someone/math")


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), ValueError("gone"), RuntimeError("gone")])
def test_a_refusal_of_the_hub_says_that_no_local_file_was_found_either(hub, error):
    hub.answer = error
    message = refusal(read_rows, "someone/math")
    assert "'someone/math' is no local file" in message
    assert "gone" in message


def test_an_empty_dataset_of_the_hub_is_refused(hub):
    import datasets

    hub.answer = datasets.Dataset.from_list([])
    assert "someone/math holds no rows" in refusal(read_rows, "someone/math")


# --- Prompts ---------------------------------------------------------------------------------------


def test_a_text_prompt_is_tokenised_as_it_stands(chatml):
    (example,) = load([{"prompt": "the question is"}], chatml)
    assert example.prompt == "the question is"
    assert list(example.prompt_ids) == chatml("the question is")["input_ids"]
    assert (example.gold_ids, example.gold_weights, example.answer) == (None, None, None)


def test_a_chat_prompt_ends_where_the_assistant_speaks(chatml):
    (example,) = load([{"prompt": user("the question")}], chatml)
    assert example.prompt == "<|im_start|>user\nthe question<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.decode(example.prompt_ids) == example.prompt


def test_chat_template_options_reach_the_template(chatml):
    (example,) = load([{"prompt": user("q")}], chatml, chat_template_kwargs={"enable_thinking": False})
    assert example.prompt.endswith("assistant\n<think></think>")


@pytest.mark.parametrize("prompt", ["abc", "<s>abc", user("abc")], ids=["text", "text that has it", "chat"])
def test_bos_comes_once_and_eos_never(llama_like, prompt):
    others = [{"prompt": "<s>first"}, {"prompt": "second"}]
    example = load([*others, {"prompt": prompt}], llama_like)[-1]
    assert example.prompt_ids[0] == llama_like.bos_token_id
    assert example.prompt_ids.count(llama_like.bos_token_id) == 1
    assert llama_like.eos_token_id not in example.prompt_ids


def test_a_chat_template_without_bos_is_taken_at_its_word(llama_like):
    bare = copy.deepcopy(llama_like)
    bare.chat_template = llama_like.chat_template.replace("{{ bos_token }}", "")
    text, chat = load([{"prompt": "abc"}, {"prompt": user("abc")}], bare)
    assert bare.bos_token_id in text.prompt_ids
    assert bare.bos_token_id not in chat.prompt_ids


def test_text_and_chat_prompts_may_be_mixed_and_keep_their_order_across_batches(chatml, monkeypatch):
    monkeypatch.setattr("stableopd.data._TOKENIZE_BATCH", 3)
    rows = [{"prompt": user(f"q {n}") if n % 2 else f"q {n}"} for n in range(10)]
    examples = load(rows, chatml)
    assert [example.index for example in examples] == list(range(10))
    assert [chatml.decode(example.prompt_ids) for example in examples] == [example.prompt for example in examples]
    assert all(f"q {n}" in example.prompt for n, example in enumerate(examples))


def test_a_missing_prompt_column_is_refused_with_the_nearest_name(chatml):
    message = refusal(load, [{"promt": "a", "id": 1}], chatml)
    assert "rows, row 1: no column 'prompt'. Its columns are 'promt', 'id'; did you mean 'promt'?" in message
    assert "Set data.prompt_column" in message


def test_a_prompt_missing_in_one_row_is_refused_there(chatml):
    assert "rows, row 2: no column 'question'" in refusal(
        load, [{"question": "a"}, {"id": 1}], chatml, prompt_column="question"
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (None, "'prompt' is null. A prompt is a string or a list of chat messages"),
        ({"role": "user"}, "'prompt' is an object. A prompt is"),
        ("", "'prompt' is empty"),
        (" \n", "'prompt' is empty"),
        ([], "'prompt' is empty. Give at least one chat message"),
        ([{"from": "human", "value": "a"}], "which is no chat message"),
        (["a"], "'a', which is no chat message"),
        (user("a") + assistant("b"), "ends in an assistant's turn. Put that turn into the gold column"),
        ([{"role": "tool", "content": "a"}], "is refused by the chat template: no tools here"),
    ],
)
def test_an_unusable_prompt_is_refused_with_its_row(chatml, prompt, expected):
    message = refusal(load, [{"prompt": "fine"}, {"prompt": prompt}], chatml)
    assert message.startswith("rows, row 2: ")
    assert expected in message


def test_chat_messages_need_a_chat_template(chatml, monkeypatch):
    monkeypatch.setattr(chatml, "chat_template", None)
    assert "row 1: 'prompt' is a list of chat messages, but the tokenizer has no chat template" in refusal(
        load, [{"prompt": user("a")}], chatml
    )


def test_a_text_that_the_tokenizer_refuses_is_named(llama_like):
    message = refusal(load, [{"prompt": "a"}, {"prompt": "b%"}, {"prompt": "c"}], llama_like)
    assert "rows, row 2: the tokenizer cannot encode 'b%'" in message


def test_an_overlong_prompt_is_refused_with_its_length_the_limit_and_how_many_there_are(llama_like):
    rows = [{"prompt": "abc"}, {"prompt": "abcd"}, {"prompt": "abcdefg"}]
    assert len(load(rows, llama_like, max_prompt_tokens=8)) == 3
    message = refusal(load, rows, llama_like, max_prompt_tokens=4)
    assert "row 2: the prompt has 5 tokens, more than the 4 allowed; 2 of 3" in message
    assert "the longest has 8" in message
    assert "data.max_prompt_length" in message


def test_no_rows_at_all_are_refused(chatml):
    assert "rows holds no rows" in refusal(load, [], chatml)


# --- Gold ------------------------------------------------------------------------------------------


def test_gold_for_text_ends_in_eos(chatml):
    (example,) = load([{"prompt": "the question", "gold": " is 42"}], chatml)
    assert example.gold_ids == (*chatml(" is 42")["input_ids"], chatml.eos_token_id)


def test_gold_for_chat_ends_in_the_end_of_turn(chatml):
    (example,) = load([{"prompt": user("q"), "gold": "42"}], chatml)
    assert chatml.decode(example.gold_ids) == "42<|im_end|>"


@pytest.mark.parametrize("gold", ["42", "42<|im_end|>", "42<|im_end|>\n", "42<|endoftext|>"])
def test_an_end_that_gold_carries_already_is_not_doubled(chatml, gold):
    (example,) = load([{"prompt": user("q"), "gold": gold}], chatml)
    assert chatml.decode(example.gold_ids) == "42<|im_end|>"


def test_gold_keeps_its_own_white_space(chatml):
    (example,) = load([{"prompt": "q", "gold": " 42\n"}], chatml)
    assert chatml.decode(example.gold_ids) == " 42\n<|endoftext|>"


def test_gold_has_no_bos_of_its_own(llama_like):
    (example,) = load([{"prompt": "q", "gold": "ab"}], llama_like)
    assert example.gold_ids == (*llama_like.convert_tokens_to_ids(["a", "b"]), llama_like.eos_token_id)


def test_gold_is_tokenised_apart_so_that_the_prompt_is_the_one_of_a_rollout(chatml):
    with_gold, bare = load([{"prompt": "the ans", "gold": "wer is 42"}, {"prompt": "the ans"}], chatml)
    assert with_gold.prompt_ids == bare.prompt_ids
    joined = [*with_gold.prompt_ids, *with_gold.gold_ids[:-1]]
    assert chatml.decode(joined) == "the answer is 42"
    assert joined != chatml("the answer is 42")["input_ids"]


def test_trl_prompt_and_completion_messages_are_understood(chatml):
    (example,) = load([{"prompt": user("q"), "completion": assistant("42")}], chatml, require_gold=True)
    assert chatml.decode(example.gold_ids) == "42<|im_end|>"


def test_trl_text_completions_are_understood(chatml):
    (example,) = load([{"prompt": "q", "completion": " 42"}], chatml, require_gold=True)
    assert chatml.decode(example.gold_ids) == " 42<|endoftext|>"


def test_a_gold_column_takes_precedence_over_completions(chatml):
    (example,) = load([{"prompt": "q", "gold": "1", "completion": "2"}], chatml)
    assert chatml.decode(example.gold_ids) == "1<|endoftext|>"


def test_completions_are_left_alone_where_another_gold_column_was_asked_for(chatml):
    (example,) = load([{"prompt": "q", "completion": "2"}], chatml, gold_column="solution")
    assert example.gold_ids is None


def test_messages_may_carry_empty_fields_as_tables_do(chatml):
    (example,) = load([{"prompt": user("q"), "gold": assistant("42", tool_calls=None)}], chatml)
    assert chatml.decode(example.gold_ids) == "42<|im_end|>"


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        (42, "'gold' is a number. A golden answer is a string"),
        (user("a"), "one message of the assistant"),
        (assistant("a") + assistant("b"), "it has 2"),
        (["a"], "one message of the assistant"),
        (assistant("a", reasoning_content="because"), "has 'reasoning_content' beside its content"),
        (assistant([{"type": "text", "text": "a"}]), "'gold' is a list"),
    ],
)
def test_unusable_gold_is_refused_with_its_row(chatml, gold, expected):
    message = refusal(load, [{"prompt": "q", "gold": "a"}, {"prompt": "q", "gold": gold}], chatml)
    assert message.startswith("rows, row 2: 'gold'")
    assert expected in message


def test_required_gold_that_is_nowhere_is_refused_with_how_to_turn_it_off(chatml):
    message = refusal(load, [{"prompt": "q", "golden": "a"}], chatml, require_gold=True)
    assert "rows: no golden answers: no row has a column 'gold' nor TRL's 'completion'" in message
    assert "did you mean 'golden'?" in message
    assert "data.gold_column" in message
    assert "objective.gold.coef=0" in message
    assert "method=opd" in message


@pytest.mark.parametrize("lack", [{}, {"gold": None}, {"gold": ""}, {"gold": " "}, {"gold": []}])
def test_required_gold_that_some_rows_lack_is_refused_with_the_first_and_their_number(chatml, lack):
    rows = [{"prompt": "q", "gold": "a"}, {"prompt": "q", **lack}, {"prompt": "q"}]
    message = refusal(load, rows, chatml, require_gold=True)
    assert message.startswith("rows, row 2: no golden answer in the column 'gold'; 2 of 3 rows have none")
    assert "objective.gold.coef=0" in message


def test_rows_may_lack_gold_where_it_is_not_required(chatml):
    examples = load([{"prompt": "q", "gold": "a"}, {"prompt": "q", "gold": None}], chatml)
    assert [example.gold_ids is None for example in examples] == [False, True]


def test_gold_that_could_not_be_ended_is_refused_but_prompts_alone_are_not(llama_like):
    endless = copy.deepcopy(llama_like)
    endless.eos_token = None
    assert load([{"prompt": "q"}], endless)
    with pytest.raises(ModelError, match="no EOS token"):
        load([{"prompt": "q", "gold": "a"}], endless)


def test_gold_weights_go_with_their_tokens(llama_like):
    rows = [{"prompt": "q", "gold": "ab", "w": [0, 0.5, 1]}, {"prompt": "q", "gold": "a", "w": None}]
    weighted, unweighted = load(rows, llama_like, gold_weights_column="w")
    assert weighted.gold_weights == (0.0, 0.5, 1.0)
    assert unweighted.gold_weights is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"gold": "ab", "w": [1, 1]}, "'w' has 2 weights for 3 golden tokens. Give one for each token, the end token"),
        ({"gold": "ab", "w": [1, -1, 1]}, "finite numbers >= 0"),
        ({"gold": "ab", "w": [1, float("nan"), 1]}, "finite numbers >= 0"),
        ({"gold": "ab", "w": [1, True, 1]}, "finite numbers >= 0"),
        ({"gold": "ab", "w": 1.0}, "must be a list"),
        ({"gold": None, "w": [1]}, "the row has no golden answer"),
    ],
)
def test_weights_that_fit_no_tokens_are_refused(llama_like, row, expected):
    message = refusal(load, [{"prompt": "q", **row}], llama_like, gold_weights_column="w")
    assert message.startswith("rows, row 1: 'w'")
    assert expected in message


def test_answers_are_made_text(chatml):
    rows = [{"prompt": "q", "answer": answer} for answer in (42, 0, "x", None)]
    assert [example.answer for example in load(rows, chatml)] == ["42", "0", "x", None]


def test_numbers_that_are_whole_are_the_same_answer_however_they_are_stored(chatml):
    rows = [{"prompt": "q", "answer": answer} for answer in (5, 5.0, 5.5, "5.0", 10**400)]
    assert [example.answer for example in load(rows, chatml)] == ["5", "5", "5.5", "5.0", str(10**400)]


@pytest.mark.parametrize("answer", [[1, 2], {"value": 1}, b"1", [], float("nan")])
def test_what_nothing_can_be_compared_with_is_no_answer(chatml, answer):
    """The column may be another program's: only who judges by it is told. NaN is how tables spell a gap."""
    rows = [{"prompt": "q", "answer": answer}]
    assert load(rows, chatml)[0].answer is None
    words = "no answer in the column" if isinstance(answer, float) else "which nothing can be compared with"
    assert words in refusal(load, rows, chatml, require_answer=True)
    if isinstance(answer, float):
        assert load(rows, chatml, judged=True)[0].answer is None
    else:
        assert words in refusal(load, rows, chatml, judged=True)


def test_required_answers_that_are_nowhere_are_refused_with_how_to_do_without(chatml):
    message = refusal(load, [{"prompt": "q", "anwser": "a"}], chatml, require_answer=True)
    assert "rows: no answers to reward: no row has a column 'answer'" in message
    assert "did you mean 'anwser'?" in message
    assert "Set data.answer_column" in message
    assert "objective.reward.coef=0" in message


def test_required_answers_that_some_rows_lack_are_refused_and_empty_ones_are_answers(chatml):
    rows = [{"prompt": "q", "answer": ""}, {"prompt": "q", "answer": None}, {"prompt": "q"}]
    message = refusal(load, rows, chatml, require_answer=True)
    assert message.startswith("rows, row 2: no answer in the column 'answer', which the reward needs; 2 of 3 rows")
    assert "objective.reward.coef=0" in message
    assert load(rows[:1], chatml, require_answer=True)[0].answer == ""


@pytest.mark.parametrize("option", ["answer_column", "gold_weights_column"])
def test_a_column_that_was_asked_for_by_name_must_exist(chatml, option):
    message = refusal(load, [{"prompt": "q", "solution": 1}], chatml, **{option: "solutoin"})
    assert "no column 'solutoin'" in message
    assert "did you mean 'solution'?" in message
    assert f"Set data.{option}" in message


def test_the_rows_of_a_datasets_table_can_be_used_as_they_are(chatml):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": user("q"), "completion": assistant("42")}])
    (example,) = load(table, chatml, require_gold=True)
    assert chatml.decode(example.gold_ids) == "42<|im_end|>"


# --- Drawing ---------------------------------------------------------------------------------------


def numbered(size, gold=True):
    ends = (1,) if gold else None
    return [Example(index=index, prompt=str(index), prompt_ids=(index,), gold_ids=ends) for index in range(size)]


def indices(batch):
    return [example.index for example in batch]


sizes = st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))
seeds = st.integers(0, 2**40)


@given(sizes, seeds, st.booleans())
def test_an_epoch_draws_full_batches_and_no_prompt_twice(size_and_count, seed, shuffle):
    size, count = size_and_count
    stream = PromptStream(numbered(size), num_prompts=count, seed=seed, shuffle=shuffle)
    for epoch in range(3):
        steps = range(epoch * stream.steps_per_epoch + 1, (epoch + 1) * stream.steps_per_epoch + 1)
        drawn = [index for step in steps for index in indices(stream.batch(step))]
        assert len(drawn) == len(set(drawn)) == size // count * count


@given(sizes, seeds, st.lists(st.integers(1, 500), min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_step_alone(size_and_count, seed, steps):
    size, count = size_and_count
    used, fresh = (PromptStream(numbered(size), num_prompts=count, seed=seed) for _ in range(2))
    for step in steps:
        used.batch(step)
    assert indices(used.batch(steps[0])) == indices(fresh.batch(steps[0]))


def test_epochs_and_seeds_have_orders_of_their_own():
    examples = numbered(50)
    first, other = (PromptStream(examples, num_prompts=50, seed=seed) for seed in (0, 1))
    orders = [indices(first.batch(1)), indices(first.batch(2)), indices(other.batch(1)), list(range(50))]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_of_a_seed_never_changes_between_releases():
    stream = PromptStream(numbered(8), num_prompts=4, seed=7)
    assert [indices(stream.batch(step)) for step in (1, 2, 3)] == [[6, 3, 4, 0], [2, 7, 5, 1], [5, 1, 2, 7]]


def test_every_prompt_is_drawn_sooner_or_later_although_each_epoch_leaves_some_out():
    stream = PromptStream(numbered(10), num_prompts=7, seed=0)
    assert {index for step in range(1, 20) for index in indices(stream.batch(step))} == set(range(10))


def test_without_shuffling_prompts_come_in_their_order():
    stream = PromptStream(numbered(5), num_prompts=2, seed=0, shuffle=False)
    assert [indices(stream.batch(step)) for step in (1, 2, 3)] == [[0, 1], [2, 3], [0, 1]]


def test_the_cursor_counts_the_prompts_drawn():
    stream = PromptStream(numbered(5), num_prompts=2, seed=0)
    assert [stream.cursor(step) for step in (0, 1, 3)] == [0, 2, 6]


def test_a_dataset_smaller_than_a_step_is_refused():
    message = refusal(PromptStream, numbered(3), num_prompts=4, seed=0)
    assert "3 prompts, fewer than the 4 of one step" in message
    assert "rollout.num_prompts to at most 3" in message


@given(st.integers(1, 12), st.integers(0, 40), st.integers(1, 100), seeds)
def test_gold_of_a_step_is_as_distinct_as_its_pool_allows(size, count, step, seed):
    pool = GoldPool(numbered(size), seed=seed)
    drawn = indices(pool.batch(step, count))
    assert len(drawn) == count
    times = [drawn.count(index) for index in range(size)]
    assert max(times) - min(times) <= 1


@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 100), seeds)
def test_gold_depends_on_seed_and_step_alone(size, count, step, seed):
    used, fresh = (GoldPool(numbered(size), seed=seed) for _ in range(2))
    used.batch(step + 1, count)
    assert indices(used.batch(step, count)) == indices(fresh.batch(step, count))


def test_gold_is_drawn_in_another_order_than_prompts_are():
    examples = numbered(50)
    stream, pool = PromptStream(examples, num_prompts=50, seed=0), GoldPool(examples, seed=0)
    assert indices(stream.batch(1)) != indices(pool.batch(1, 50))


def test_a_small_pool_is_used_up_before_it_repeats():
    pool = GoldPool(numbered(12), seed=3)
    assert sorted(index for step in (1, 2, 3) for index in indices(pool.batch(step, 4))) == list(range(12))


def test_a_pool_without_gold_is_refused():
    assert "the gold pool is empty" in refusal(GoldPool, [], seed=0)
    lacking = [*numbered(1), Example(index=1, prompt="q", prompt_ids=(1,))]
    assert "row 2 of the gold pool has no golden answer" in refusal(GoldPool, lacking, seed=0)
