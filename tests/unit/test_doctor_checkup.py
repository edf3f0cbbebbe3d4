"""The cheap half of the doctor as the trainer calls it: fast, without false alarms, and firm."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from doctor_pairs import CHATML, CHATML_WITH_DEFAULT, bpe, chat_rows, text_rows
from transformers import GenerationConfig, Qwen3Config

from stableopd.config import StableOPDConfig
from stableopd.config_files import check_resumable, dump_config, load_config
from stableopd.data import load_examples
from stableopd.doctor.checkup import cheap_findings, refuse_fatal, sampling_findings, student_side
from stableopd.doctor.findings import Finding
from stableopd.doctor.sides import Side, spread
from stableopd.errors import ModelError
from stableopd.toy.models import build_model

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


def family_side(name: str, **tokenizer: object) -> Side:
    """A side as the models of the recipes are: ChatML, an end of turn and an end of text."""
    made = bpe(**tokenizer)
    return Side(
        name=name,
        tokenizer=made,
        model_config=Qwen3Config(vocab_size=len(made), max_position_embeddings=4096),
        generation_config=GenerationConfig(eos_token_id=[2, 0] if name == "teacher" else 0),
    )


@pytest.mark.parametrize("rows", [chat_rows(64), text_rows(64)], ids=["chats", "texts"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_raise_no_alarm_on_a_base_student_and_an_instruct_teacher_of_one_family(recipe, rows):
    config = load_config(recipe)
    student = family_side("student", eos="<|endoftext|>", template=CHATML_WITH_DEFAULT)
    teacher = family_side("teacher", eos="<|im_end|>", template=CHATML)
    examples = load_examples(
        rows, student.tokenizer, source="rows", chat_template_kwargs=config.data.chat_template_kwargs
    )
    found = cheap_findings(config, student, [teacher], examples)
    assert [finding for finding in found if finding.danger != "note"] == []


def test_ten_thousand_prompts_take_less_than_a_second(tokenizer):
    config = StableOPDConfig(rollout={"max_completion_length": 128})
    student = student_side(
        build_model(num_layers=1, hidden_size=16, num_heads=2, tokenizer=tokenizer, seed=0), tokenizer
    )
    teacher = Side(name="teacher", tokenizer=tokenizer, model_config=student.model_config)
    rows = [{"prompt": f"{n:04d}:", "gold": f";{n}$"} for n in range(10_000)]
    examples = load_examples(rows, tokenizer, source="rows")
    began = time.perf_counter()
    found = cheap_findings(config, student, [teacher], examples)
    assert time.perf_counter() - began < 1.0
    assert found == []


def test_several_teachers_are_told_apart():
    config = StableOPDConfig(rollout={"num_prompts": 2}, method="opd")
    student = family_side("student", eos="<|endoftext|>", template=None)
    good = Side(name="teacher text", tokenizer=bpe(eos="<|endoftext|>", template=None))
    bad = Side(name="teacher chat", tokenizer=bpe())
    found = cheap_findings(config, student, [good, bad], [], chat=False)
    (end,) = [finding for finding in found if finding.check == "end_tokens"]
    assert "the teacher chat does not end" in end.summary


def test_a_teacher_at_a_server_without_a_tokenizer_is_a_note():
    config = StableOPDConfig(rollout={"num_prompts": 2, "max_completion_length": 64}, method="opd")
    found = cheap_findings(config, family_side("student", pad=None), [Side(name="teacher")], [])
    assert [(finding.check, finding.danger) for finding in found] == [("teacher_unknown", "note")]
    found = cheap_findings(config, family_side("student", pad=None), [], [])
    assert [(finding.check, finding.danger) for finding in found] == [("teacher_missing", "fatal")]
    sft = StableOPDConfig(rollout={"num_prompts": 2}, method="sft")
    assert cheap_findings(sft, family_side("student", pad=None), [], []) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"rollout": {"temperature": 0.05}}, ["problem"]),
        ({"rollout": {"top_p": 0.9}}, ["note"]),
        ({"rollout": {"top_p": 0.9}, "objective": {"correction": {"kind": "truncate"}}}, []),
        ({"rollout": {"top_k": 20}, "objective": {"distill": {"divergence": "reverse_kl"}}}, []),
        ({"rollout": {"temperature": 0.05}, "method": "sft"}, []),
    ],
)
def test_ways_of_sampling_that_teach_little_are_told(changes, expected):
    assert [finding.danger for finding in sampling_findings(StableOPDConfig(**changes))] == expected


def test_fatal_findings_are_refused_with_their_remedies_and_the_way_round():
    fatal = Finding(check="end_tokens", danger="fatal", summary="never ends", evidence="ids 1, 2", remedy="set it")
    problem = Finding(check="bos", danger="problem", summary="twice", remedy="take one out")
    refuse_fatal([problem])
    refuse_fatal([fatal], ignore=True)
    with pytest.raises(
        ModelError, match=r"end_tokens: never ends \(ids 1, 2\). Remedy: set it\n.*doctor=warn"
    ) as error:
        refuse_fatal([fatal, problem])
    assert "bos" not in str(error.value)


def test_the_setting_can_be_switched_off_in_yaml_and_between_two_halves_of_a_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("doctor: off\n")
    config = load_config(path)
    assert config.doctor == "off"
    assert StableOPDConfig().doctor == "refuse"
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_config(StableOPDConfig()))
    check_resumable(stored, config)


def test_a_sample_is_even_and_never_larger_than_asked():
    assert spread(range(10), 20) == list(range(10))
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert len(spread(range(10_007), 10_000)) == 10_000
