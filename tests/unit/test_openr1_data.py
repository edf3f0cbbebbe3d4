"""The paper's data: what is dropped and counted, what is chosen, and which part a prompt gets."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openr1_rows import (
    ascii_tokenizer,
    contents,
    killed_until_done,
    many_rows,
    row,
    rows_of_each_kind,
    write_parquet,
)
from stableopd.curation.cards import quantiles
from stableopd.curation.openr1 import COLUMNS, Recipe
from stableopd.curation.parts import make_parts
from stableopd.curation.plain import verdict_of
from stableopd.curation.screening import Screening, chosen
from stableopd.curation.sources import HubSource, open_source
from stableopd.curation.splitting import draw, prompt_key, threshold_of_fraction
from stableopd.data import load_examples
from stableopd.errors import DataError, RunFolderError
from stableopd.judges import get_judge

TOKENIZER = ascii_tokenizer()
SMALL = Recipe(
    screening=Screening(max_gold_tokens=60, tail_chars=40, compression_threshold=3.0), instruction="Think.", seed=3
)


def make(path: Path, out: Path, recipe: Recipe = SMALL, judge=None) -> dict:
    source = open_source(str(path), columns=COLUMNS)
    return make_parts(source, TOKENIZER, recipe, out, judge=judge, names={"dataset": "d", "tokenizer": "t"})


def written_rows(out: Path, *parts: str) -> list[dict]:
    return [
        json.loads(line)
        for part in parts or ("cold_start", "opd", "heldout")
        for line in (out / f"{part}.jsonl").read_text().splitlines()
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


# ------------------------------------------------------------------------------------ what is dropped


@pytest.mark.parametrize("prompt_format", ["chat", "text"])
def test_prompts_are_as_long_as_a_run_finds_them(tmp_path, prompt_format):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [row(f"What is {'1' * length} + 1?", "It is 3.") for length in range(9)]
    )
    whole = replace(SMALL, prompt_format=prompt_format, instruction="", num_heldout=0)
    assert make(path, tmp_path / "all", whole)["counts"]["Rows"]["kept"] == 9
    tokenizer = ascii_tokenizer()
    if prompt_format == "chat":
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    prompts = load_examples(written_rows(tmp_path / "all", "cold_start", "opd"), tokenizer, source="all")
    limit = sorted(len(one.prompt_ids) for one in prompts)[4]
    source = open_source(str(path), columns=COLUMNS)
    card = make_parts(
        source, tokenizer, replace(whole, max_prompt_tokens=limit), tmp_path / "some", judge=None,
        names={"dataset": "d", "tokenizer": "t"},
    )  # fmt: skip
    assert card["counts"]["Rows"]["long_prompt"] == 4
    assert card["counts"]["Rows"]["kept"] == 5


def test_each_reason_is_counted_and_the_counts_add_up(tmp_path):
    card = make(write_parquet(tmp_path / "rows.parquet", rows_of_each_kind()), tmp_path / "out")
    rows, generations = card["counts"]["Rows"], card["counts"]["Generations"]
    assert rows == {
        "read": 15, "no_problem": 2, "long_prompt": 0, "no_generations": 1, "no_answer": 0, "no_gold": 8,
        "duplicate": 1, "kept": 3,
    }  # fmt: skip
    assert generations == {
        "all": 15, "fit": 5, "not_text": 2, "incomplete": 1, "truncated": 1, "too_long": 1, "repetitive": 1,
        "not_judged": 1, "judge_failed": 0, "wrong": 3,
    }  # fmt: skip
    assert rows["read"] == sum(rows.values()) - rows["read"]
    assert generations["all"] == sum(generations.values()) - generations["all"]


def test_a_written_row_trains_as_it_is(tmp_path):
    make(write_parquet(tmp_path / "rows.parquet", rows_of_each_kind()), tmp_path / "out")
    rows = {one["problem"]: one for one in written_rows(tmp_path / "out")}
    assert set(rows) == {"two that fit", "a wrong one and a right one", "without an answer"}
    assert rows["a wrong one and a right one"] == {
        "prompt": [{"role": "user", "content": "a wrong one and a right one\nThink."}],
        "gold": "1+1=2:9+9+",
        "answer": "7",
        "problem": "a wrong one and a right one",
        "source_id": "id of a wrong one and a right one",
        "source": "olympiads",
        "problem_type": "Algebra",
        "generation": 1,
        "gold_tokens": 10,
    }


def test_prompts_can_be_plain_text_without_an_instruction(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [row("What?", "1")])
    make(path, tmp_path / "out", replace(SMALL, prompt_format="text", instruction=""))
    assert [one["prompt"] for one in written_rows(tmp_path / "out")] == ["What?"]


@pytest.mark.parametrize(("choose", "gold"), [("shortest", "22"), ("first", "333")])
def test_the_golden_one_is_chosen_among_those_that_fit(tmp_path, choose, gold):
    path = write_parquet(tmp_path / "rows.parquet", [row("p", "1", "333", "22", right=[False, True, True])])
    make(path, tmp_path / "out", replace(SMALL, choose=choose))
    assert [one["gold"] for one in written_rows(tmp_path / "out")] == [gold]


def test_a_random_choice_is_the_same_each_time_and_reaches_every_candidate():
    candidates = [(0, 5), (1, 6), (2, 7)]
    picks = [chosen(candidates, "random", seed=0, key=f"prompt {n}") for n in range(60)]
    assert set(picks) == {0, 1, 2}
    assert picks == [chosen(candidates[::-1], "random", seed=0, key=f"prompt {n}") for n in range(60)]


def test_the_judge_is_asked_anew_and_one_that_fails_is_counted(tmp_path):
    def judge(text: str, answer: str) -> bool:
        if "boom" in text:
            raise RuntimeError("hangs")
        return text == answer

    rows = [
        row("p", "7", "8", "boom", right=[False, True, True]),
        row("q", "7", answer=None),
        row("r", "7", answer=" "),
    ]
    card = make(write_parquet(tmp_path / "rows.parquet", rows), tmp_path / "out", replace(SMALL, judge="math"), judge)
    assert [one["gold"] for one in written_rows(tmp_path / "out")] == ["7"]
    assert {name: card["counts"]["Generations"][name] for name in ("fit", "wrong", "judge_failed")} == {
        "fit": 1, "wrong": 1, "judge_failed": 1
    }  # fmt: skip
    assert card["counts"]["Rows"]["no_answer"] == 2


def test_math_verify_overrules_what_is_stored(tmp_path):
    rows = [row("half", "so \\boxed{0.5}", "so \\boxed{2}", answer="\\frac{1}{2}", right=[False, True])]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    make(path, tmp_path / "out", replace(SMALL, judge="math"), get_judge("math"))
    assert [one["gold"] for one in written_rows(tmp_path / "out")] == ["so \\boxed{0.5}"]


def test_a_generation_of_just_the_longest_length_stays(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [row("p", "12345"), row("q", "123456")])
    make(path, tmp_path / "out", replace(SMALL, screening=Screening(max_gold_tokens=5)))
    assert [one["gold"] for one in written_rows(tmp_path / "out")] == ["12345"]


NO_ANSWERS = [None, " ", float("nan"), float("inf"), [], ["7"], {"value": 7}]


def test_what_is_no_answer_is_not_written_as_one(tmp_path):
    rows = [{**row(f"p{n}", "1"), "answer": answer} for n, answer in enumerate([*NO_ANSWERS, 7, 0.5, "x"])]
    card = make(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", replace(SMALL, num_cold_start=10))
    answers = {one["problem"]: one["answer"] for one in written_rows(tmp_path / "out", "cold_start", "heldout")}
    assert [answers[f"p{n}"] for n in range(10)] == [None] * 7 + ["7", "0.5", "x"]
    assert card["counts"]["Answers of kept rows"] == {"with": 3, "without": 7}


def test_what_is_no_answer_is_not_compared_with(tmp_path):
    rows = [{**row(f"p{n}", "nan"), "answer": answer} for n, answer in enumerate([*NO_ANSWERS, "nan"])]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    card = make(path, tmp_path / "out", replace(SMALL, judge="math"), lambda text, answer: True)
    assert card["counts"]["Rows"]["no_answer"] == len(NO_ANSWERS)
    assert [one["answer"] for one in written_rows(tmp_path / "out")] == ["nan"]


@pytest.mark.parametrize(
    ("verdict", "read"),
    [
        (True, True), (0, False), (1.0, True), ("True", True), (" FALSE ", False), (None, None),
        (np.True_, True), (np.int8(0), False), (pa.scalar(False), False), (pa.scalar(None, pa.bool_()), None),
    ],
)  # fmt: skip
def test_a_verdict_is_read_as_what_it_says(verdict, read):
    assert verdict_of(verdict, "here") is read


@pytest.mark.parametrize("verdict", ["no", "", "0", 2, -1, float("nan"), [], [True], {}, pa.scalar("yes")])
def test_what_is_no_verdict_is_refused(verdict):
    with pytest.raises(DataError, match=r"here says .*no verdict"):
        verdict_of(verdict, "here")


# ------------------------------------------------------------------------------------ the split


@settings(max_examples=15, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.integers(0, 5),
    st.sampled_from([None, 0, 3, 10, 10_000]),
    st.sampled_from([0, 2, 500]),
)
def test_no_order_of_rows_changes_a_prompts_part_and_no_prompt_is_in_two(
    tmp_path_factory, chance, seed, number, heldout
):
    folder = tmp_path_factory.mktemp("split")
    rows = many_rows(60, seed)
    recipe = replace(SMALL, seed=seed, num_cold_start=number, num_heldout=heldout, duplicates="keep")
    make(write_jsonl(folder / "a.jsonl", rows), folder / "a", recipe)
    chance.shuffle(rows)
    make(write_jsonl(folder / "b.jsonl", rows), folder / "b", recipe)
    parts = {}
    for part in ("cold_start", "opd", "heldout")[: 3 if heldout else 2]:
        parts[part] = Counter(json.dumps(one) for one in written_rows(folder / "a", part))
        assert parts[part] == Counter(json.dumps(one) for one in written_rows(folder / "b", part))
    prompts = {part: {json.loads(one)["problem"] for one in rows} for part, rows in parts.items()}
    everything = set.union(*prompts.values())
    assert sum(len(ones) for ones in prompts.values()) == len(everything)
    if heldout:
        assert len(prompts["heldout"]) == min(heldout, len(everything) // 10) > 0
    if number is not None:
        assert len(prompts["cold_start"]) == min(number, len(everything) - len(prompts.get("heldout", ())))


def test_prompts_that_differ_in_white_space_or_form_are_one_prompt():
    assert prompt_key("x² +\n 1 ") == prompt_key("x2 + 1")
    assert prompt_key("x + 1") != prompt_key("X + 1")


def test_of_equal_prompts_the_first_with_gold_is_kept_or_all(tmp_path):
    rows = [row("p", "1", right=[False]), row("p", "22"), row(" p", "3"), row("q", "4")]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    make(path, tmp_path / "first")
    make(path, tmp_path / "keep", replace(SMALL, duplicates="keep"))
    assert sorted(one["gold"] for one in written_rows(tmp_path / "first")) == ["22", "4"]
    assert sorted(one["gold"] for one in written_rows(tmp_path / "keep")) == ["22", "3", "4"]


def test_the_share_of_the_cold_start_is_what_was_asked_for():
    below = sum(draw(0, "split", f"{n}") < threshold_of_fraction(33 / 46) for n in range(20_000))
    assert abs(below / 20_000 - 33 / 46) < 0.015  # 4.7 standard deviations
    assert threshold_of_fraction(1.0) == 2**64


# ------------------------------------------------------------------------------------ files and resuming


def test_killed_at_every_file_operation_it_goes_on_to_the_same_bytes(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", many_rows(700))
    recipe = replace(SMALL, num_cold_start=100)
    make(path, tmp_path / "whole", recipe)
    kills = killed_until_done(lambda: make(path, tmp_path / "killed", recipe))
    assert kills > 10
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    parts = {"cold_start.jsonl", "opd.jsonl", "heldout.jsonl"}
    assert set(contents(tmp_path / "whole")) == {*parts, "README.md", "card.json"}


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", many_rows(20))
    card = make(path, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert make(path, tmp_path / "out") == card
    with pytest.raises(RunFolderError, match="seed: 3 -> 4"):
        make(path, tmp_path / "out", replace(SMALL, seed=4))
    write_parquet(path, many_rows(21))
    with pytest.raises(RunFolderError, match="sha256"):
        make(path, tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), r"is not as it was written \(\d+ lines then, \d+ now"),
        (lambda path: path.write_text(path.read_text().replace("Think", "Drink")), "is not as it was written"),
        (lambda path: path.unlink(), "is gone"),
    ],
)
def test_a_finished_folder_that_was_damaged_is_not_vouched_for(tmp_path, damage, message):
    path = write_parquet(tmp_path / "rows.parquet", many_rows(40))
    make(path, tmp_path / "out")
    damage(tmp_path / "out" / "opd.jsonl")
    with pytest.raises(RunFolderError, match=rf"opd.jsonl {message}.*remove the folder .*out, or choose another --out"):
        make(path, tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"settings": {}, "source": {}, "outputs": {}}'])
def test_a_damaged_card_is_told(tmp_path, text):
    path = write_parquet(tmp_path / "rows.parquet", many_rows(5))
    make(path, tmp_path / "out")
    (tmp_path / "out" / "card.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"card.json is not a data card, or is damaged"):
        make(path, tmp_path / "out")


def test_a_folder_that_holds_something_else_is_not_written_into(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", many_rows(5))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "opd.jsonl").write_text("mine")
    with pytest.raises(RunFolderError, match="already holds something"):
        make(path, tmp_path / "out")
    assert contents(tmp_path / "out") == {"opd.jsonl": b"mine"}


def test_jsonl_parquet_and_several_files_give_the_same_rows(tmp_path):
    rows = many_rows(150)
    (tmp_path / "several").mkdir()
    write_parquet(tmp_path / "several" / "train-00000-of-00002.parquet", rows[:70])
    write_parquet(tmp_path / "several" / "train-00001-of-00002.parquet", rows[70:])
    sources = {"one": write_parquet(tmp_path / "one.parquet", rows), "lines": write_jsonl(tmp_path / "l.jsonl", rows)}
    for name, path in {**sources, "both": tmp_path / "several"}.items():
        make(path, tmp_path / f"out-{name}")
    whole = written_rows(tmp_path / "out-one")
    assert whole == written_rows(tmp_path / "out-lines") == written_rows(tmp_path / "out-both")


def test_files_called_alike_in_several_folders_are_told_apart(tmp_path):
    rows = many_rows(30)
    for folder, part in (("a", rows[:10]), ("b", rows[10:])):
        (tmp_path / "source" / folder).mkdir(parents=True)
        write_parquet(tmp_path / "source" / folder / "train.parquet", part)
    card = make(tmp_path / "source", tmp_path / "out")
    assert card["source"]["files"] == 2
    assert card["source"]["names"] == "a/train.parquet, b/train.parquet"
    write_parquet(tmp_path / "source" / "a" / "train.parquet", rows[:9])
    with pytest.raises(RunFolderError, match="sha256"):
        make(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("start", [0, 4, 5, 13, 20, 25, 31])
def test_rows_go_on_from_any_row(tmp_path, start):
    rows = many_rows(31)
    (tmp_path / "d").mkdir()
    write_parquet(tmp_path / "d" / "a.parquet", rows[:13])
    write_jsonl(tmp_path / "d" / "b.jsonl", rows[13:20])
    write_parquet(tmp_path / "d" / "c.parquet", rows[20:])
    source = open_source(str(tmp_path / "d"), columns=("uuid",))
    assert [one["uuid"] for _, one in source.rows(start)] == [one["uuid"] for one in rows[start:]]


def test_a_hub_dataset_is_streamed_with_the_columns_that_count(tmp_path):
    """A folder of Parquet files is read by the same library, in the same way, as a repository."""
    rows = many_rows(9)
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    source = HubSource(
        repository=str(tmp_path), configuration=None, split="train", revision=None, wanted=("uuid", "nothing")
    )
    assert "generations" in source.columns()
    assert [one for _, one in source.rows(4)] == [{"uuid": one["uuid"]} for one in rows[4:]]


def test_the_limit_reads_no_further(tmp_path):
    rows = [*(row(f"p{n}", "1") for n in range(4)), row("p", "1", complete=[True, False])]
    write_parquet(tmp_path / "rows.parquet", rows)
    assert make(tmp_path / "rows.parquet", tmp_path / "out", replace(SMALL, limit=4))["counts"]["Rows"]["read"] == 4


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**row("p", "1"), "generations": "1"}], "line 1: 'generations' is a string"),
        ([row("p", "1"), row("q", "1", complete=[True, False])], "line 2: 'is_reasoning_complete' has 2 entries for 1"),
        ([{"prompt": "p", "generations": []}], "lacks the columns 'problem', 'correctness_math_verify'"),
        (
            [row("p", "1"), row("q", "1", right=["no"])],
            "line 2: 'correctness_math_verify' says 'no', which is no verdict",
        ),
        ([row("p", "1", complete=["unknown"])], "line 1: 'is_reasoning_complete' says 'unknown'"),
        ([row("p", "1", right=[False])], "not one prompt has a golden solution.*wrong 1"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, rows, message):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message):
        make(path, tmp_path / "out")
    assert not (tmp_path / "out" / "card.json").exists()


@pytest.mark.parametrize(("name", "content"), [("a.parquet", b"PAR1 not really"), ("a.csv", b"a,b"), ("a.jsonl", b"{")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        make(tmp_path / name, tmp_path / "out")


def test_a_missing_source_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_source(str(tmp_path / "nothing.parquet"), columns=COLUMNS)


# ------------------------------------------------------------------------------------ the card


@given(st.lists(st.integers(0, 50), min_size=1))
def test_quantiles_of_a_histogram_are_those_of_the_lengths(lengths):
    found = quantiles(Counter(lengths))
    ordered = sorted(lengths)
    assert (found["min"], found["max"], found["number"]) == (ordered[0], ordered[-1], len(lengths))
    for name, share in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95)):
        wanted = next(length for length in ordered if sum(one <= length for one in lengths) >= share * len(lengths))
        assert found[name] == wanted


def test_the_card_tells_digests_of_what_lies_beside_it(tmp_path):
    from hashlib import sha256

    make(write_parquet(tmp_path / "rows.parquet", many_rows(40)), tmp_path / "out")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    for name, figures in card["outputs"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert figures == {"rows": data.count(b"\n"), "sha256": sha256(data).hexdigest()}
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"| kept | {card['counts']['Rows']['kept']} |" in readme
    assert card["outputs"]["opd.jsonl"]["sha256"] in readme
