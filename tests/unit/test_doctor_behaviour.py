"""What the doctor sees when it lets a pair run: a trained toy pair, and the same pair broken in one place."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from stableopd.config import StableOPDConfig
from stableopd.data import load_examples
from stableopd.doctor.behaviour import behaviour_findings
from stableopd.errors import ConfigError
from stableopd.teachers.local import LocalTeacher
from stableopd.toy.build import train_student, train_teacher
from stableopd.toy.demo import TOKENIZER, DemoSettings, one_thread
from stableopd.toy.task import World, answer, gold, prompt_text, prompts
from stableopd.vocabulary import end_token_ids

pytestmark = pytest.mark.slow  # a pair is trained

CONFIG = {
    "teacher": {"model_name_or_path": "toy"},
    "rollout": {"max_completion_length": 40},
    "health": {"tail_chars": 36, "compression_threshold": 2.2},
    "evaluation": {"judge": "stableopd.toy.task:judge"},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    settings = DemoSettings(out=tmp_path_factory.mktemp("pair"), quick=True)
    world = settings.build_world()
    with one_thread():
        teacher = train_teacher(world, TOKENIZER, 0, settings.teacher_recipe, lambda *_: None)
        student = train_student(world, TOKENIZER, 0, settings.student_recipe, lambda *_: None)
    return student.eval(), teacher.eval()


@pytest.fixture(scope="module")
def examples():
    world = World.t4()
    rows = [{"prompt": prompt_text(p), "gold": gold(world, p), "answer": answer(p)} for p in prompts(world)[::700]]
    return load_examples(rows, TOKENIZER, source="toy")[:12]


def examined(student, teacher, examples, **changes):
    return behaviour_findings(
        student=copy.deepcopy(student),
        teacher=copy.deepcopy(teacher),
        tokenizer=TOKENIZER,
        examples=examples,
        end_ids=end_token_ids(TOKENIZER),
        config=StableOPDConfig(**{**CONFIG, **changes}),
        device="cpu",
        seed=1,
    )


def alarms(findings):
    return {finding.check: finding.danger for finding in findings if finding.danger != "note"}


def with_rows(model, change):
    """The model with its output rows changed in place."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        change(changed.lm_head.weight)
    return changed


def swapped(one, other):
    def change(weight):
        weight[[one, other]] = weight[[other, one]]

    return change


def test_a_trained_pair_raises_no_alarm(pair, examples):
    findings, figures = examined(*pair, examples)
    assert alarms(findings) == {}
    assert figures["teacher_end_at_gold"] > 0.5
    assert figures["reverse_kl"] > 0.05
    assert figures["topk_overlap"] > 0.4
    assert figures["engine_gap"] < 1e-3
    assert 0 < figures["right_fraction"] < 1


def test_a_teacher_that_ends_in_another_token_is_fatal_and_the_token_is_named(pair, examples):
    student, teacher = pair
    end, other = TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("9")
    findings, _ = examined(student, with_rows(teacher, swapped(end, other)), examples)
    assert alarms(findings)["teacher_ends"] == "fatal"
    [found] = [finding for finding in findings if finding.check == "teacher_ends"]
    assert f"'9' ({other})" in found.evidence
    assert "rollout.stop_token_ids" in found.remedy
    assert findings[0] is found


def test_a_teacher_of_another_vocabulary_is_forecast_to_be_incompatible(pair, examples):
    student, teacher = pair
    order = torch.randperm(len(TOKENIZER), generator=torch.Generator().manual_seed(3))
    findings, figures = examined(student, with_rows(teacher, lambda weight: weight.copy_(weight[order])), examples)
    [found] = [finding for finding in findings if finding.check == "agreement"]
    assert found.summary.startswith("forecast: incompatible")
    assert figures["reverse_kl"] > 2


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(pair, examples):
    student, _ = pair
    findings, figures = examined(student, student, examples)
    assert alarms(findings) == {"agreement": "problem"}
    assert findings[0].summary.startswith("forecast: nothing to learn")
    assert abs(figures["reverse_kl"]) < 1e-3


def test_a_teacher_with_nan_weights_is_fatal(pair, examples):
    student, teacher = pair
    findings, _ = examined(student, with_rows(teacher, lambda weight: weight.fill_(torch.nan)), examples)
    assert alarms(findings)["not_finite"] == "fatal"
    assert "the teacher gives log-probabilities" in findings[0].summary


def test_a_student_with_nan_weights_is_fatal(pair, examples):
    student, teacher = pair
    findings, _ = examined(with_rows(student, lambda weight: weight.fill_(torch.nan)), teacher, examples)
    assert alarms(findings) == {"not_finite": "fatal"}


def test_gold_that_is_cut_off_says_nothing_about_ends(pair, examples):
    cut = [replace(example, gold_ids=example.gold_ids[:2]) for example in examples]
    findings, figures = examined(*pair, cut)
    assert alarms(findings) == {}
    assert "teacher_end_at_gold" not in figures


def test_any_end_token_of_the_teachers_is_an_end(pair, examples):
    student, teacher = pair
    end, other = TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("9")
    findings, figures = behaviour_findings(
        student=copy.deepcopy(student),
        teacher=with_rows(teacher, swapped(end, other)),
        tokenizer=TOKENIZER,
        examples=examples,
        end_ids=end_token_ids(TOKENIZER) | {other},
        config=StableOPDConfig(**CONFIG),
        device="cpu",
    )
    assert "teacher_ends" not in alarms(findings)
    assert figures["teacher_end_at_gold"] > 0.5


def test_masked_special_tokens_are_no_problem(pair, examples):
    student, teacher = pair
    end, pad = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    silent = with_rows(teacher, lambda weight: weight[pad].copy_(-5 * weight[end]))
    masked = {"distill": {"tokens": {"mask_special": True}}}
    findings, _ = examined(with_rows(student, swapped(end, pad)), silent, examples, objective=masked)
    assert "special_tokens" not in alarms(findings)


def test_a_student_that_never_ends_is_found_before_the_run(pair, examples):
    student, teacher = pair
    end, other = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    never = with_rows(student, swapped(end, other))  # says PAD where it should end
    findings, figures = examined(never, teacher, examples)
    assert alarms(findings)["truncated_at_start"] == "problem"
    assert figures["truncated_fraction"] > 0.5


def test_special_tokens_that_the_teacher_never_says_are_named(pair, examples):
    student, teacher = pair
    end, pad = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    silent = with_rows(teacher, lambda weight: weight[pad].copy_(-5 * weight[end]))
    findings, _ = examined(with_rows(student, swapped(end, pad)), silent, examples)
    [found] = [finding for finding in findings if finding.check == "special_tokens"]
    assert f"({pad})" in found.evidence
    assert "mask_special" in found.remedy


def test_a_student_in_a_loop_is_found_before_the_run(pair, examples):
    student, teacher = pair
    loop = copy.deepcopy(student)
    digit = TOKENIZER.convert_tokens_to_ids("7")
    with torch.no_grad():  # whatever it reads, the last layer sees one thing, and says 7
        loop.model.norm.weight.zero_()
        loop.lm_head.weight.zero_()
    loop.lm_head = torch.nn.Linear(loop.lm_head.in_features, loop.lm_head.out_features)
    with torch.no_grad():
        loop.lm_head.weight.zero_()
        loop.lm_head.bias.zero_()
        loop.lm_head.bias[digit] = 30.0
    findings, figures = examined(loop, teacher, examples)
    assert alarms(findings)["repetitive_at_start"] == "problem"
    assert figures["repetitive_fraction"] == 1.0


def test_a_model_whose_scores_depend_on_the_batch_is_found(pair, examples):
    student, teacher = pair
    moody = copy.deepcopy(teacher)

    def hook(module, args, kwargs, output):
        output.last_hidden_state.mul_(1 + 0.05 * output.last_hidden_state.shape[1])

    moody.model.register_forward_hook(hook, with_kwargs=True)
    findings, figures = behaviour_findings(
        student=copy.deepcopy(student),
        teacher=moody,
        tokenizer=TOKENIZER,
        examples=[*examples[:3], *examples[:3]],
        end_ids=end_token_ids(TOKENIZER),
        config=StableOPDConfig(**CONFIG, optimizer={"micro_batch_tokens": 60}),
        device="cpu",
    )
    assert alarms(findings)["consistency"] == "problem"
    assert figures["rescoring_gap_teacher"] > 1e-3


def test_the_same_seed_gives_the_same_figures(pair, examples):
    assert examined(*pair, examples)[1] == examined(*pair, examples)[1]


def test_without_a_teacher_the_student_is_looked_at_alone(pair, examples):
    student, _ = pair
    findings, figures = examined(student, None, examples, method="grpo")
    assert alarms(findings) == {}
    assert "mean_length" in figures
    assert "reverse_kl" not in figures


def test_a_teacher_that_gives_the_sampled_token_alone_is_enough(pair, examples):
    student, teacher = pair
    near = LocalTeacher(
        copy.deepcopy(teacher), model_id="t", vocab_size=len(TOKENIZER), token_budget=512, autocast=nullcontext
    )

    class Far:
        def score(self, rollouts, *, temperature, topk=0, states=False):
            if topk:
                raise ConfigError("no top-k here")
            return near.score(rollouts, temperature=temperature)

    findings, figures = behaviour_findings(
        student=copy.deepcopy(student),
        teacher=Far(),
        tokenizer=TOKENIZER,
        examples=examples,
        end_ids=end_token_ids(TOKENIZER),
        config=StableOPDConfig(**CONFIG),
        device="cpu",
    )
    assert alarms(findings) == {}
    assert "topk_overlap" not in figures
    assert figures["teacher_end_at_gold"] > 0.5
