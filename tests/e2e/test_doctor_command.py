"""`stableopd doctor` as a user types it: broken pairs are found with the remedy, healthy ones are left in peace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from doctor_pairs import (
    CHATML,
    CHATML_WITH_DEFAULT,
    HEADERS,
    NO_GENERATION_PROMPT,
    OTHER_CORPUS,
    THINKING,
    Pair,
    bpe,
    chat_rows,
    drop_merges,
    lower_case,
    text_rows,
)

from stableopd import cli

UNIT = str(Path(__file__).parents[1] / "unit")
SOURCE = str(Path(cli.__file__).parents[1])
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "110",
    "NO_COLOR": "1",
    "PYTHONPATH": os.pathsep.join((SOURCE, UNIT)),
}


@pytest.fixture
def doctor(monkeypatch, capfd):
    """The command in this process, where starting Python and torch anew would be most of the work."""

    def doctor(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["stableopd", "doctor", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "110")
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main()
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(list(arguments), exited.value.code or 0, out, err)

    return doctor


# ------------------------------------------------------------------------------------ broken pairs


def other_vocabulary(pair: Pair) -> None:
    pair.teacher["tokenizer"] = bpe(corpus=OTHER_CORPUS)


def other_merges(pair: Pair) -> None:
    pair.teacher["tokenizer"] = bpe(change=drop_merges)


def other_normaliser(pair: Pair) -> None:
    pair.teacher["tokenizer"] = bpe(change=lower_case)


def renamed_turn_marker(pair: Pair) -> None:
    def rename(described: dict) -> None:
        for token in described["added_tokens"]:
            token["content"] = token["content"].replace("im_start", "turn")
        vocab = described["model"]["vocab"]
        vocab["<|turn|>"] = vocab.pop("<|im_start|>")

    template = CHATML.replace("im_start", "turn")
    pair.teacher["tokenizer"] = bpe(change=rename, template=template)


def few_student_embeddings(pair: Pair) -> None:
    pair.student["rows"] = 300


def few_teacher_embeddings(pair: Pair) -> None:
    pair.teacher["rows"] = 300


def base_student_instruct_teacher(pair: Pair) -> None:
    pair.student["tokenizer"] = bpe(eos="<|endoftext|>", template=None)
    pair.rows = text_rows()


def base_student_whose_teacher_lists_both_ends(pair: Pair) -> None:
    base_student_instruct_teacher(pair)
    pair.teacher["eos"] = [2, 0]


def no_end_token(pair: Pair) -> None:
    pair.student["tokenizer"] = bpe(eos=None, template=None)
    pair.rows = [{"prompt": row["prompt"]} for row in text_rows()]
    pair.settings["method"] = "opd"


def end_token_beyond_the_vocabulary(pair: Pair) -> None:
    pair.student["eos"] = [2, 5000]


def other_template(pair: Pair) -> None:
    pair.teacher["tokenizer"] = bpe(template=HEADERS)


def student_without_template(pair: Pair) -> None:
    pair.student["tokenizer"] = bpe(template=None)


def teacher_without_template(pair: Pair) -> None:
    pair.teacher["tokenizer"] = bpe(template=None)


def broken_template(pair: Pair) -> None:
    pair.student["tokenizer"] = bpe(template="{% for m in messages %}{{ m.role }")


def thinking_on_one_side(pair: Pair) -> None:
    pair.student["tokenizer"] = bpe(template=THINKING)


def no_generation_prompt(pair: Pair) -> None:
    for side in (pair.student, pair.teacher):
        side["tokenizer"] = bpe(template=NO_GENERATION_PROMPT)


def doubled_bos(pair: Pair) -> None:
    for side in (pair.student, pair.teacher):
        side["tokenizer"] = bpe(bos=True, template="{{ bos_token }}{{ bos_token }}" + CHATML)


def teacher_expects_bos(pair: Pair) -> None:
    pair.teacher["tokenizer"] = bpe(bos=True)


def budget_beyond_context(pair: Pair) -> None:
    pair.teacher["positions"] = 64


def budget_below_gold(pair: Pair) -> None:
    pair.set("rollout", max_completion_length=16)


def gold_beyond_context(pair: Pair) -> None:
    pair.rows[3]["gold"] = " ".join(str(n**3) for n in range(100)) + pair.rows[3]["gold"]


def gold_without_end(pair: Pair) -> None:
    for row in pair.rows[::6]:
        row["gold"] = row["gold"].split("}")[0]


def looping_gold(pair: Pair) -> None:
    pair.set("rollout", max_completion_length=128)
    pair.rows[5]["gold"] = "wait, " * 20


def wrong_gold(pair: Pair) -> None:
    for row in pair.rows[::4]:
        row["answer"] = "0"


def failing_judge(pair: Pair) -> None:
    pair.set("evaluation", judge="doctor_pairs:raises")


def missing_gold(pair: Pair) -> None:
    pair.rows[2]["gold"] = "  "


def missing_answers(pair: Pair) -> None:
    pair.set("objective", reward={"coef": 1.0})
    del pair.rows[2]["answer"]


def long_prompt(pair: Pair) -> None:
    pair.rows[1]["prompt"][0]["content"] *= 40


def held_out_prompts_trained_on(pair: Pair) -> None:
    pair.held_out = chat_rows(4)


def few_prompts(pair: Pair) -> None:
    pair.rows = chat_rows(3)


def bad_rows(pair: Pair) -> None:
    pair.rows[4]["prompt"] = 7


def almost_greedy(pair: Pair) -> None:
    pair.set("rollout", temperature=0.01)


BROKEN: dict[Callable[[Pair], None], tuple[str, str, str, str]] = {
    other_vocabulary: ("vocabulary", "fatal", "another id", "of one family"),
    other_merges: ("tokenization", "fatal", "differs in model", "one tokenizer for both"),
    other_normaliser: ("normaliser", "problem", "differs in normalizer", "tokenizer.json"),
    renamed_turn_marker: ("added_tokens", "problem", "<|im_start|>", "turn markers"),
    few_student_embeddings: (
        "vocabulary_size",
        "fatal",
        "the first id without an embedding",
        "resize_token_embeddings",
    ),
    few_teacher_embeddings: ("vocabulary_size", "fatal", "(300)", "the teacher was trained with"),
    base_student_instruct_teacher: ("end_tokens", "fatal", "'<|im_end|>' (2)", "rollout.stop_token_ids=[2]"),
    base_student_whose_teacher_lists_both_ends: ("end_tokens", "fatal", "by habit", "rollout.stop_token_ids=[2]"),
    no_end_token: ("no_end_token", "fatal", "no EOS token", "eos_token_id"),
    end_token_beyond_the_vocabulary: ("end_token_unknown", "problem", "5000", "generation_config.json"),
    other_template: ("chat_template", "problem", "[USER]", "the teacher's chat template"),
    student_without_template: ("chat_template", "fatal", "not set", "plain text"),
    teacher_without_template: ("chat_template", "problem", "<|im_start|>", "trained on chats"),
    broken_template: ("chat_template", "fatal", "Error", "correct tokenizer.chat_template"),
    thinking_on_one_side: ("thinking_mode", "problem", "enable_thinking", "data.chat_template_kwargs"),
    no_generation_prompt: ("generation_prompt", "problem", "changes nothing", "<|im_start|>assistant"),
    doubled_bos: ("bos", "problem", "'<s>'", "take the begin token out"),
    teacher_expects_bos: ("bos", "problem", "puts '<s>'", "add_bos_token"),
    budget_beyond_context: ("context", "fatal", "64 tokens of context", "below 64"),
    budget_below_gold: ("gold_length", "problem", "max_completion_length=16", "rollout.max_completion_length to"),
    gold_beyond_context: ("gold_context", "fatal", "256 tokens of context", "shorter gold"),
    gold_without_end: ("gold_truncated", "problem", "row 1 ends in", "larger length limit"),
    looping_gold: ("gold_repetitive", "problem", "row 6 ends in", "remove these rows"),
    wrong_gold: ("gold_fails", "problem", "the answer is '0'", "remove wrong solutions"),
    failing_judge: ("judge", "problem", "RuntimeError", "evaluation.judge"),
    missing_gold: ("gold_missing", "fatal", "row 3", "method=opd"),
    missing_answers: ("answers_missing", "fatal", "row 3", "objective.reward.coef=0"),
    long_prompt: ("prompt_length", "fatal", "the longest has", "rollout.max_completion_length"),
    held_out_prompts_trained_on: ("contamination", "problem", "What is", "remove them from the training data"),
    few_prompts: ("num_prompts", "fatal", "", "rollout.num_prompts to at most 3"),
    bad_rows: ("data", "fatal", "line 5", "a list of chat messages"),
    almost_greedy: ("sampling", "problem", "temperature=0.01", "rollout.temperature=1.0"),
}


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda function: function.__name__)
def test_a_broken_pair_is_found_with_its_danger_and_its_remedy(break_it, tmp_path, doctor):
    check, danger, evidence, remedy = BROKEN[break_it]
    pair = Pair(tmp_path)
    break_it(pair)
    done = doctor(pair.write(), "--quick", "--json")
    assert done.returncode == 1, done.stderr
    findings = [finding for finding in json.loads(done.stdout)["findings"] if finding["check"] == check]
    assert findings, done.stdout
    assert findings[0]["danger"] == danger
    assert evidence in findings[0]["evidence"]
    assert remedy in findings[0]["remedy"]
    dangers = [finding["danger"] for finding in json.loads(done.stdout)["findings"]]
    assert dangers == sorted(dangers, key=("fatal", "problem", "note").index)


ALONE = set(BROKEN) - {
    student_without_template,  # hides whether prompts would be fine
    broken_template,  # and also ends no turn
    other_vocabulary,  # other ids of all that is checked later
    renamed_turn_marker,  # is also another rendering
    looping_gold,  # is also wrong and without a box
    gold_without_end,  # is also wrong
    long_prompt,  # leaves no room for its gold either
    teacher_expects_bos,  # is also another template
}


@pytest.mark.parametrize("break_it", sorted(ALONE, key=lambda f: f.__name__), ids=lambda function: function.__name__)
def test_nothing_else_is_blamed_for_a_single_fault(break_it, tmp_path, doctor):
    pair = Pair(tmp_path)
    break_it(pair)
    found = json.loads(doctor(pair.write(), "--quick", "--json").stdout)["findings"]
    assert {finding["check"] for finding in found if finding["danger"] != "note"} == {BROKEN[break_it][0]}


# ------------------------------------------------------------------------------------ healthy pairs


def as_it_is(pair: Pair) -> None:
    pass


def plain_text(pair: Pair) -> None:
    pair.rows = text_rows()
    pair.held_out = text_rows(30)[24:]


def padded(pair: Pair) -> None:
    pair.student["rows"], pair.teacher["rows"] = 384, 512


def base_student_with_the_teachers_ends(pair: Pair) -> None:
    base_student_instruct_teacher(pair)
    pair.set("rollout", stop_token_ids=[2])


def base_student_with_corrected_generation_config(pair: Pair) -> None:
    base_student_whose_teacher_lists_both_ends(pair)
    pair.student["eos"] = [0, 2]


def base_student_that_knows_turns(pair: Pair) -> None:
    pair.student["tokenizer"] = bpe(eos="<|endoftext|>", template=CHATML_WITH_DEFAULT)
    pair.teacher["eos"] = [2, 0]


def thinking_decided(pair: Pair) -> None:
    pair.student["tokenizer"] = bpe(template=THINKING)
    pair.teacher["tokenizer"] = bpe(template=THINKING)
    pair.set("data", chat_template_kwargs={"enable_thinking": False})


def bos_on_both_sides(pair: Pair) -> None:
    for side in (pair.student, pair.teacher):
        side["tokenizer"] = bpe(bos=True, template="{{ bos_token }}" + CHATML)


HEALTHY = (
    as_it_is,
    plain_text,
    padded,
    base_student_with_the_teachers_ends,
    base_student_with_corrected_generation_config,
    base_student_that_knows_turns,
    thinking_decided,
    bos_on_both_sides,
)


@pytest.mark.parametrize("make", HEALTHY, ids=lambda function: function.__name__)
def test_a_healthy_pair_raises_no_alarm(make, tmp_path, doctor):
    pair = Pair(tmp_path)
    make(pair)
    done = doctor(pair.write(), "--quick", "--json")
    found = json.loads(done.stdout)
    assert [finding for finding in found["findings"] if finding["danger"] != "note"] == []
    assert done.returncode == 0
    assert found["healthy"]


def test_the_toy_pair_raises_no_alarm(run_settings, tmp_path, doctor):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_settings()))
    done = doctor(path, "--quick", "--json")
    assert json.loads(done.stdout)["findings"] == []
    assert done.returncode == 0


# ------------------------------------------------------------------------------------ the command


def test_the_table_names_the_danger_the_evidence_and_the_remedy_and_ends_in_a_verdict(tmp_path, doctor):
    pair = Pair(tmp_path)
    base_student_instruct_teacher(pair)
    wrong_gold(pair)
    done = doctor(pair.write(), "--quick")
    assert done.returncode == 1
    words = " ".join(done.stdout.split())
    for part in ("fatal", "end_tokens", "problem", "gold_fails", "rollout.stop_token_ids=[2]", "24 prompts"):
        assert part in words
    assert done.stdout.index("end_tokens") < done.stdout.index("gold_fails")
    assert done.stdout.rstrip().endswith("Do not start: 1 fatal finding, and 1 problem.")


def test_a_setting_on_the_command_line_mends_what_the_remedy_names(tmp_path, doctor):
    pair = Pair(tmp_path)
    base_student_instruct_teacher(pair)
    path = pair.write()
    assert doctor(path, "--quick").returncode == 1
    done = doctor(path, "--quick", "rollout.stop_token_ids=[2]")
    assert done.returncode == 0, done.stdout
    assert "Nothing stands in the way" in done.stdout


def test_a_pair_can_be_named_without_a_configuration(tmp_path, doctor):
    pair = Pair(tmp_path)
    pair.rows = pair.rows[:8]
    pair.write()
    sides = ("--student", tmp_path / "student", "--teacher", tmp_path / "teacher")
    done = doctor("rollout.max_completion_length=64", *sides, "--quick")
    assert done.returncode == 0, done.stdout
    assert "no data was given" in done.stdout
    done = doctor(*sides, "--data", tmp_path / "train.jsonl", "--quick", "--json", "max_completion_length=64")
    assert done.returncode == 0, done.stdout
    assert "8 prompts" in json.loads(done.stdout)["looked_at"]


def test_what_data_and_models_say_cannot_steer_the_terminal(tmp_path, doctor):
    pair = Pair(tmp_path)
    pair.rows = [*pair.rows, {**pair.rows[0], "prompt": [{"role": "user", "content": "\x1b[2J[red]x\u202ey"}]}] * 2
    failing_judge(pair)
    done = doctor(pair.write(), "--quick")
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a CONFIG.yaml, or --student and --teacher"),
        (["absent.yaml"], "absent.yaml: no such configuration file"),
        (["run.yaml", "student.model_name_or_path=/nowhere/at/all"], "there is no folder '/nowhere/at/all'"),
        (["run.yaml", "data.path=/nowhere/train.jsonl"], "/nowhere/train.jsonl"),
        (["run.yaml", "data.path=broken.jsonl"], "broken.jsonl, line 2"),
        (["run.yaml", "data.pathh=x"], "unknown key"),
        (["run.yaml", "evaluation.judge=nowhere:f"], "cannot be imported"),
        (["run.yaml", "--prompts", "0"], "prompts"),
    ],
)
def test_what_cannot_be_read_is_bad_input_with_one_message(arguments, words, tmp_path, doctor, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Pair(tmp_path).write()
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    done = doctor(*arguments, "--quick")
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_the_command_in_a_process_of_its_own_writes_json_alone_to_standard_output(tmp_path):
    pair = Pair(tmp_path)
    other_merges(pair)
    command = [sys.executable, "-m", "stableopd", "doctor", str(pair.write()), "--quick", "--json"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["counts"]["fatal"] == 1


def test_help_teaches_with_an_example(doctor):
    done = doctor("--help")
    assert done.returncode == 0
    assert "stableopd doctor run.yaml" in " ".join(done.stdout.split())
    assert "Exit status" in done.stdout
