from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stableopd.errors import ConfigError
from stableopd.study.cells import cells_of
from stableopd.study.config import StudyConfig, load_study
from stableopd.study.final import final_job, protocol
from stableopd.study.inputs import check_contents, check_inputs, contents_of
from stableopd.study.jobs import Job
from stableopd.study.layers import merged
from stableopd.study.made_with import made_with, settings_digest, standing
from stableopd.study.outcome import Outcome, read_outcomes
from stableopd.study.running import _jobs, _without_twins

ROOT = Path(__file__).resolve().parents[2]
PAIRS = {"p": {"teacher": {"model_name_or_path": "a"}}, "q": {"teacher": {"model_name_or_path": "b"}}}
BASE = {"student": {"model_name_or_path": "s"}, "teacher": {"model_name_or_path": "t"}, "data": {"path": "d.jsonl"}}
WORLD = {"name": "toy", "teachers": {"a": {"seed": 1}, "b": {"habit": "clean", "seed": 2}}}
ASKED = {**BASE, "evaluation": {"path": "held_out.jsonl"}}


def study(**given) -> StudyConfig:
    base = {} if "world" in given else BASE
    return StudyConfig(**{"base": base, "methods": {"opd": {}}, "output_dir": "out", "final": None, **given})


def test_every_method_meets_every_pair_and_seed_and_the_seeds_go_last():
    cells = cells_of(study(methods={"opd": {}, "sft": {}}, pairs=PAIRS, seeds=[0, 7]))
    assert len(cells) == 8
    assert [cell.seed for cell in cells] == [0] * 4 + [7] * 4
    assert {(cell.arm, cell.pair) for cell in cells if cell.seed == 7} == {
        (method, pair) for method in ("opd", "sft") for pair in ("p", "q")
    }
    assert len({cell.folder for cell in cells}) == 8
    assert all(cell.config.seed == cell.seed for cell in cells)


def test_the_grid_crosses_its_methods_alone_and_a_method_may_have_its_own():
    cells = cells_of(
        study(
            methods={"opd": {}, "stableopd": {}, "mine": {"method": "stableopd", "grid": {"temperature": [0.7, 1.0]}}},
            grid={"lambda_gold": [0.3, 1.0], "objective.reference.coef": [0.0, 0.1]},
            grid_methods=["stableopd"],
        )
    )
    assert len(cells) == 1 + 4 + 2
    found = {cell.arm: cell.config.objective for cell in cells}
    arm = found["stableopd lambda_gold=0.3 objective.reference.coef=0.1"]
    assert (arm.gold.coef, arm.reference.coef) == (0.3, 0.1)
    assert found["opd"].gold.coef == 0.0


def test_a_method_is_the_trainers_of_its_name_or_says_which():
    methods = {"sft": {}, "grpo": {}, "x": {"method": "opd"}, "opd": {"method": "stableopd"}}
    found = {cell.method: cell.config.method for cell in cells_of(study(methods=methods))}
    assert found == {"sft": "sft", "grpo": "grpo", "x": "opd", "opd": "stableopd"}
    with pytest.raises(ConfigError, match=r"methods.opdd does not say what it is \(did you mean 'opd'"):
        cells_of(study(methods={"opdd": {}}))


def test_a_part_of_a_study_has_the_runs_of_the_whole_and_no_others():
    whole = study(
        methods={"opd": {}, "stableopd": {}, "sft": {}}, pairs=PAIRS, compare_with="opd",
        grid={"max_steps": [1, 2]}, grid_methods=["sft"],
    )  # fmt: skip
    digests = {(cell.arm, cell.pair): settings_digest(whole, cell) for cell in cells_of(whole)}
    part = whole.only(["stableopd", "opd"], ["q"])
    found = {(cell.arm, cell.pair): settings_digest(part, cell) for cell in cells_of(part)}
    assert found == {key: digests[key] for key in (("opd", "q"), ("stableopd", "q"))}
    assert part.reference_method == "opd"
    assert whole.only(["sft", "stableopd"]).reference_method == "stableopd"
    assert whole.only() == whole
    made = study(world=WORLD)
    assert made.only(pairs=["b"]).pair_names() == ["b"]
    assert settings_digest(made, cells_of(made)[1]) == settings_digest(made, cells_of(made.only(pairs=["b"]))[0])
    with pytest.raises(ConfigError, match="did you mean 'stableopd'"):
        whole.only(["stabelopd"])
    with pytest.raises(ConfigError, match="there is no pair 'r'; known: p, q"):
        whole.only(pairs=["r"])


def test_pair_settings_lie_over_the_base_and_the_methods_over_both():
    base = {**BASE, "learning_rate": 1e-6, "rollout": {"num_prompts": 8}}
    pairs = {"large": {"student.model_name_or_path": "large", "optimizer": {"learning_rate": 2e-6}}}
    (cell,) = cells_of(study(base=base, pairs=pairs, methods={"opd": {"learning_rate": 3e-6}}))
    assert cell.config.student.model_name_or_path == "large"
    assert cell.config.optimizer.learning_rate == 3e-6
    assert cell.config.rollout.num_prompts == 8
    assert cell.config.teacher.model_name_or_path == "t"


def test_layers_are_merged_and_not_changed():
    under = {"data": {"path": "a", "chat_template_kwargs": {"x": 1}}}
    assert merged(under, {"data.path": "b"}) == {"data": {"path": "b", "chat_template_kwargs": {"x": 1}}}
    assert merged(under, {"data": {"chat_template_kwargs": {"y": 2}}})["data"]["chat_template_kwargs"] == {
        "x": 1,
        "y": 2,
    }
    assert under == {"data": {"path": "a", "chat_template_kwargs": {"x": 1}}}


def test_all_methods_of_a_pair_and_seed_begin_with_the_student_of_one_cold_start():
    cells = cells_of(
        study(
            methods={"opd": {}, "sft": {"start": "student"}, "stableopd": {}},
            cold_start={"max_steps": 30, "data": {"path": "cold.jsonl"}},
            pairs={**PAIRS, "r": {"student": {"model_name_or_path": "other"}}},
        )
    )
    by_method = {(cell.method, cell.pair): cell for cell in cells}
    first = by_method["opd", "p"]
    assert first.cold_start.method == "sft"
    assert first.cold_start.data.path == "cold.jsonl"
    assert first.cold_start.student.model_name_or_path == "s"
    begun_with = Path(first.config.student.model_name_or_path)
    assert begun_with == first.cold_start.run_dir / "checkpoints" / "step-000030"
    assert first.config.data.path == "d.jsonl"
    assert by_method["stableopd", "p"].cold_start == first.cold_start
    assert by_method["opd", "q"].cold_start.run_dir == first.cold_start.run_dir  # another teacher alone
    assert by_method["opd", "r"].cold_start.run_dir != first.cold_start.run_dir  # another student
    assert by_method["sft", "p"].cold_start is None
    other = {"max_steps": 30, "data": {"path": "cold.jsonl"}, "learning_rate": 0.1}
    assert cells_of(study(cold_start=other))[0].cold_start.run_dir != first.cold_start.run_dir
    assert by_method["sft", "p"].config.student.model_name_or_path == "s"


def test_a_cold_start_of_adapters_leaves_a_whole_model_or_is_refused():
    lora = {"student": {"model_name_or_path": "s", "lora": {"r": 2, "merge": True}}}
    cell = cells_of(study(base={**BASE, **lora}, cold_start={"max_steps": 3}))[0]
    assert cell.config.student.model_name_or_path == str(cell.cold_start.run_dir / "merged")
    lora["student"]["lora"]["merge"] = False
    with pytest.raises(ConfigError, match="the cold start trains adapters"):
        cells_of(study(base={**BASE, **lora}, cold_start={"max_steps": 3}))


def test_a_world_makes_the_pairs_and_says_where_they_are():
    methods = {"sft": {"data": {"gold_path": "{world}/data/gold_pool.jsonl"}}}
    cells = cells_of(study(world=WORLD, methods=methods, seeds=[3]))
    assert [cell.pair for cell in cells] == ["a", "b"]
    assert cells[1].config.teacher.model_name_or_path == "out/world/teachers/b"
    assert cells[1].config.student.model_name_or_path == "out/world/students/seed-3"
    assert cells[1].config.data.gold_path == "out/world/data/gold_pool.jsonl"


def test_methods_without_a_teacher_are_run_once_for_all_teachers(tmp_path):
    methods = {"opd": {}, "sft": {}, "grpo": {}}
    pairs = {"p": {}, "q": {"teacher": {"model_name_or_path": "other"}}, "r": {"student": {"model_name_or_path": "x"}}}
    made = study(methods=methods, pairs=pairs, output_dir=str(tmp_path))
    cells = cells_of(made)
    twins = [[(cell.method, cell.pair) for cell in group] for group in _without_twins(made, cells, [])]
    assert sorted(twins) == [
        [("grpo", "p"), ("grpo", "q")],
        [("grpo", "r")],
        [("opd", "p")],
        [("opd", "q")],
        [("opd", "r")],
        [("sft", "p"), ("sft", "q")],
        [("sft", "r")],
    ]
    done = Outcome(
        arm="sft", pair="q", seed=0, figures={"late_accuracy": 0.5}, verdict="healthy", headline="",
        digest=settings_digest(made, next(cell for cell in cells if (cell.method, cell.pair) == ("sft", "q"))),
    )  # fmt: skip
    left = _without_twins(made, cells, [done])
    assert ("sft", "p") not in [(cell.method, cell.pair) for group in left for cell in group]
    (given,) = read_outcomes(tmp_path / "results.jsonl")
    assert (given.key, given.figures) == (("sft", "p", 0), {"late_accuracy": 0.5})
    assert given.digest == settings_digest(made, next(c for c in cells if (c.method, c.pair) == ("sft", "p")))
    (tmp_path / "results.jsonl").unlink()
    part = made.only(["sft"], ["p"])
    assert _without_twins(part, cells_of(part), [done]) == []  # its twin is of a pair that was not asked for
    assert read_outcomes(tmp_path / "results.jsonl") == [given]
    (tmp_path / "results.jsonl").unlink()
    assert len(_without_twins(part, cells_of(part), [replace(done, digest="of other settings")])) == 1
    assert not (tmp_path / "results.jsonl").exists()


def test_the_digest_is_that_of_what_matters_to_the_result():
    def digest(**given) -> str:
        changed = study(**given)
        return settings_digest(changed, cells_of(changed)[0])

    assert digest() == digest(output_dir="elsewhere", parallel=4, base={**BASE, "logging": {"every_steps": 9}})
    assert digest() == digest(base={**BASE, "checkpoint": {"every_steps": 7}})
    back = {**BASE, "health": {"actions": "rollback"}}
    assert digest(base=back) != digest(base={**back, "checkpoint": {"every_steps": 7}})
    assert digest() != digest(base={**BASE, "learning_rate": 2e-6})
    assert digest() != digest(base={**BASE, "student": {"model_name_or_path": "other"}})
    assert digest() != digest(cold_start={"max_steps": 3})
    assert digest(cold_start={"max_steps": 3}) != digest(cold_start={"max_steps": 4})
    cold = {"cold_start": {"max_steps": 3}}
    assert digest(**cold) == digest(**cold, output_dir="moved")
    ahead = {**BASE, "rollout": {"pipeline": True}, "objective": {"correction": {"kind": "truncate"}}}
    assert digest(base=ahead) != digest(base={**ahead, "checkpoint": {"every_steps": 9}})
    assert digest() == digest(base={**BASE, "rollout": {"temperature": 1.0}})  # a default that is written out
    assert digest(late_fraction=0.5) == digest()  # what the evaluations make of it is not stored
    asked = {"base": ASKED, "final": {"num_prompts": 5}}
    assert len({digest(**asked), digest(base=ASKED), digest(base=ASKED, final={"num_prompts": 6})}) == 3
    judged = {**ASKED, "evaluation": {"path": "held_out.jsonl", "judge": "math"}}
    assert digest(base=judged, final={"num_prompts": 5, "judge": "exact"}) != digest(
        base=judged, final={"num_prompts": 5}
    )
    world = {**WORLD, "teachers": {"a": {"seed": 9}}}
    assert digest(world=WORLD) == digest(world=WORLD, output_dir="moved")
    assert digest(world=WORLD) != digest(world=world)
    assert digest(world=WORLD) != digest(world=WORLD, methods={"opd": {"data": {"path": "mine.jsonl"}}})
    pool = {"data": {"gold_path": "{world}/data/gold_pool.jsonl"}}
    assert digest(world=WORLD, base=pool) == digest(world=WORLD, base=pool, output_dir="moved")
    assert digest(world=WORLD, base=pool) != digest(world=WORLD)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"methods": {}}, "methods"),
        ({"compare_with": "opdd"}, "did you mean 'opd'"),
        ({"grid_methods": ["sft"]}, "none of the methods"),
        ({"seeds": [1, 1]}, "a seed twice"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [True]}, "seeds.0"),
        ({"seeds": [1.0]}, "seeds.0"),
        ({"seeds": [2**32]}, "seeds.0"),
        ({"base": {**BASE, "seed": 1}}, "base.seed: every run of a study is given its own; set seeds"),
        ({"pairs": {"p": {"seed": 1}}}, "pairs.p.seed"),
        ({"methods": {"opd": {"grid": {"seed": [1, 2]}}}}, "methods.opd.grid.seed"),
        ({"cold_start": {"output_dir": "x"}}, "cold_start.output_dir"),
        ({"world": WORLD, "base": {"data.path": "x"}}, "base.data.path is made by the world"),
        ({"world": WORLD, "base": {"teacher_model_name_or_path": "x"}}, "base.teacher.model_name_or_path is made"),
        ({"world": {**WORLD, "teachers": {"a": {"seed": 1}, "b": {"seed": 1}}}}, "teachers a and b are the same"),
        ({"world": WORLD, "pairs": {"p": {}}}, "both given"),
        ({"methods": {"opd": {"start": "nowhere"}}}, "cold_start or student"),
        ({"methods": {"opd": {"grid": {"lambda_gold": 1.0}}}}, "maps keys to lists"),
        ({"methods": {"../opd": {}}}, "methods"),
        ({"methods": {"opd": {"grid": {1: [2]}}}}, "methods.opd.grid: keys are the dotted names"),
        ({"world": {**WORLD, "teachers": {"a": {"habit": "lazy"}}}}, "world.teachers.a.habit"),
        ({"sedes": [1]}, "did you mean 'seeds'"),
    ],
)
def test_a_study_that_cannot_be_is_refused_with_the_reason(given, words):
    with pytest.raises(ConfigError, match=words):
        study(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pairs": {"p": {}, "q": {}}}, "the pairs 'p' and 'q' are the same run"),
        ({"grid": {"lambda_gold": [1, 1.0]}}, "'opd lambda_gold=1' and 'opd lambda_gold=1.0' are the same run"),
    ],
)
def test_a_run_is_never_counted_twice_under_two_names(given, words):
    with pytest.raises(ConfigError, match=words):
        cells_of(study(**given))


def test_a_world_says_how_its_answers_are_judged_and_the_base_may_say_otherwise():
    (config,) = [cell.config for cell in cells_of(study(world=WORLD))[:1]]
    assert config.evaluation.judge == config.objective.reward.function == "stableopd.toy.task:judge"
    assert config.health.tail_chars == 64
    changed = cells_of(study(world=WORLD, base={"evaluation": {"judge": "exact"}}))[0].config
    assert (changed.evaluation.judge, changed.evaluation.path) == ("exact", "out/world/data/validation.jsonl")


def test_final_answers_are_asked_for_as_the_runs_own_evaluations_are():
    base = {
        **BASE,
        "data": {
            "path": "d.jsonl",
            "prompt_column": "q",
            "answer_column": "a",
            "chat_template_kwargs": {"think": False},
        },
        "rollout": {"max_completion_length": 50, "stop_strings": ["END", "STOP"], "stop_token_ids": [3]},
        "evaluation": {"path": "e", "split": "dev", "judge": "math", "judge_timeout_s": 3, "top_p": 0.9},
    }
    asked = study(base=base, final={"num_samples": 4})
    options = protocol(asked.final, cells_of(asked)[0].config)
    assert options == {
        "--benchmark": ["e"], "--split": "dev", "--prompt-column": "q", "--answer-column": "a", "--samples": 4,
        "--temperature": 0.6, "--top-p": 0.9, "--greedy": True, "--max-completion-length": 50,
        "--stop-strings": ["END", "STOP"], "--stop-token-ids": [3], "--no-chat": True,
        "--chat-template-kwargs": {"think": False},
        "--judge": "math", "--judge-timeout": 3.0, "--seed": 0,
    }  # fmt: skip
    other = asked.final.model_copy(update={"seed": 5, "temperature": 0.9, "num_prompts": 7, "greedy": False})
    changed = protocol(other, cells_of(asked)[0].config)
    assert [changed[name] for name in ("--seed", "--temperature", "--num-prompts")] == [5, 0.9, 7]
    assert "--greedy" not in changed
    named = study(base=base, final={"benchmarks": ["math500"], "judge": "exact", "top_p": 1.0})
    options = protocol(named.final, cells_of(named)[0].config)
    assert not {"--split", "--prompt-column", "--answer-column"} & options.keys()  # they are those of the run's data
    assert (options["--judge"], options["--top-p"]) == ("exact", 1.0)


@pytest.mark.parametrize(
    ("chat", "benchmarks", "as_it_stands"), [(True, [], True), (True, ["math500"], False), (False, ["math500"], True)]
)
def test_the_runs_own_prompts_are_asked_as_they_stand(chat, benchmarks, as_it_stands):
    base = {**BASE, "evaluation": {"path": "e", "chat": chat}}
    asked = study(base=base, final={"benchmarks": benchmarks})
    run = Job(name="run", command=(), stem=Path("run"))
    job = final_job(asked, asked.final, cells_of(asked)[0], {}, after=run)
    assert ("--no-chat" in job.command) == as_it_stands


def test_what_the_runs_read_is_looked_for_before_the_first_is_started(tmp_path):
    (tmp_path / "held_out.jsonl").touch()
    here, absent = str(tmp_path / "held_out.jsonl"), str(tmp_path / "absent.jsonl")
    base = {**BASE, "data": {"path": here}, "evaluation": {"path": here}}
    fine = study(base=base, final={})
    check_inputs(fine, cells_of(fine))
    lacking = study(
        base={**base, "evaluation": {"path": here, "judge": "no.such:judge"}},
        methods={"opd": {"data": {"path": absent}}, "grpo": {"objective": {"reward": {"function": "nothing"}}}},
        final={"benchmarks": ["math5000", "aime24", "AIME2024", here]},
        cold_start={"student": {"model_name_or_path": "./no_model"}},
    )
    with pytest.raises(ConfigError) as caught:
        check_inputs(lacking, cells_of(lacking))
    told = str(caught.value)
    for words in (
        f"data.path: {absent} does not exist", "evaluation.judge", "objective.reward.function",
        "'math5000': it is none of the registry",
        "aime24 and AIME2024 are both called 'aime24'",
        "student.model_name_or_path: ./no_model does not exist",
    ):  # fmt: skip
        assert told.count(words) == 1, (words, told)
    unasked = study(final={})
    with pytest.raises(ConfigError, match="final has nothing to ask"):
        settings_digest(unasked, cells_of(unasked)[0])


def test_a_judge_is_tried_in_a_process_of_its_own(tmp_path, monkeypatch, capfd):
    (tmp_path / "leaving.py").write_text("print('hello')\nraise SystemExit(7)")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "held_out.jsonl").touch()
    held_out = str(tmp_path / "held_out.jsonl")
    base = {**BASE, "data": {"path": held_out}, "evaluation": {"path": held_out, "judge": "leaving:judge"}}
    left = study(base=base)
    with pytest.raises(ConfigError, match=r"evaluation.judge: .*its process ended with status 7"):
        check_inputs(left, cells_of(left))
    assert "hello" not in capfd.readouterr().out


def test_a_twin_that_read_other_prompts_is_no_twin(tmp_path):
    (tmp_path / "d.jsonl").write_text("one")
    base = {**BASE, "data": {"path": str(tmp_path / "d.jsonl")}}
    made = study(base=base, methods={"sft": {}}, pairs=PAIRS, output_dir=str(tmp_path))
    cell = cells_of(made)[0]
    done = Outcome(
        arm="sft", pair="p", seed=0, digest=settings_digest(made, cell), figures={}, verdict="", headline="",
        inputs=contents_of(made, cell),
    )  # fmt: skip
    other = made.only(pairs=["q"])
    (tmp_path / "d.jsonl").write_text("another")
    assert len(_without_twins(other, cells_of(other), [done])) == 1
    (tmp_path / "d.jsonl").write_text("one")
    assert _without_twins(other, cells_of(other), [done]) == []


def test_a_run_of_other_models_is_another_job_wherever_they_lie(tmp_path):
    def settings(**changes) -> list[str]:
        made = study(**{"world": WORLD, "final": {}, "cold_start": {}, "output_dir": str(tmp_path), **changes})
        return [job.settings for job in _jobs(made, cells_of(made)[0], False)[-3:]]

    start, run, answers = settings()
    other = settings(world={"name": "toy", "teachers": {"a": {"habit": "clean", "seed": 9}}})
    assert (start != other[0], run != other[1], answers != other[2]) == (True, True, True)
    assert settings(final={"num_prompts": 3})[:2] == [start, run]
    assert settings(base={"learning_rate": 0.5})[2] != answers
    assert settings(parallel=7) == [start, run, answers]


@pytest.mark.parametrize("setting", ["data.path", "evaluation.path", "final.benchmarks: math500={}", "evaluation"])
def test_runs_on_prompts_that_have_changed_since_are_not_mixed(tmp_path, setting):
    (tmp_path / "folder").mkdir()
    files = {"data.path": "d.jsonl", "evaluation.path": "folder/e.jsonl"}
    files |= {"final.benchmarks: math500={}": "b.parquet", "evaluation": "c.jsonl"}
    for name in files.values():
        (tmp_path / name).write_text("one")
    asked = {"path": str(tmp_path / "folder"), "benchmarks": [str(tmp_path / "c.jsonl")]}
    base = {**BASE, "data": {"path": str(tmp_path / "d.jsonl")}, "evaluation": asked}
    copy = f"math500={tmp_path / 'b.parquet'}"
    made = study(base=base, cold_start={"max_steps": 1}, final={"benchmarks": [copy]})
    cells = cells_of(made)
    inputs = contents_of(made, cells[0])
    assert {"data.path", "evaluation.path", "cold_start.data.path", f"final.benchmarks: {copy}"} < inputs.keys()
    done = Outcome(arm="opd", pair="pair", seed=0, digest="", figures={}, verdict="", headline="", inputs=inputs)
    check_contents(made, cells, [done])
    path = tmp_path / files[setting]
    path.write_text("another")
    with pytest.raises(ConfigError, match=rf"what {setting.partition(':')[0]}.* names has changed since opd of pair"):
        check_contents(made, cells, [done])
    (shutil.rmtree if setting == "evaluation.path" else Path.unlink)(path.parent if "/" in files[setting] else path)
    check_contents(made, cells, [done])  # a report needs no data


def test_a_refusal_names_what_differs_and_says_when_asking_again_will_do():
    made = study(world=WORLD, base={"max_steps": 5}, final={}, pairs={}, cold_start={"max_steps": 2})
    cell = cells_of(made)[0]
    done = Outcome(
        arm="opd", pair="a", seed=0, digest=settings_digest(made, cell), figures={}, verdict="", headline="",
        made_with=made_with(made, cell),
    )  # fmt: skip

    def refusal(**changes) -> str:
        other = made.model_copy(update={key: getattr(study(**given(changes)), key) for key in changes})
        with pytest.raises(ConfigError) as caught:
            standing(other, cells_of(other), [done])
        return str(caught.value)

    def given(changes):
        return {"world": WORLD, **changes}

    assert standing(made, cells_of(made), [done]) == [done]
    told = refusal(base={"max_steps": 7, "data": {"chat_template_kwargs": {"think": True}}})
    assert "cold_start.data.chat_template_kwargs.think: not set -> True; data.chat" in told
    assert "max_steps: 5 -> 7)" in told
    assert "--ask-again" not in told
    assert "world.teacher: 'teacher " in refusal(
        world={"name": "toy", "teachers": {"a": {"seed": 3}, "b": {"seed": 2}}}
    )
    told = refusal(final={"num_prompts": 4})
    assert "(final.--num-prompts: not set -> 4)" in told
    assert "--ask-again asks them anew without training them again" in told
    other = made.model_copy(update={"final": study(world=WORLD, final={"num_prompts": 4}).final})
    assert standing(other, cells_of(other), [done], ask_again=True) == []
    both = other.model_copy(update={"base": {"max_steps": 6}})
    with pytest.raises(ConfigError, match="max_steps: 5 -> 6"):
        standing(both, cells_of(both), [done], ask_again=True)


def test_runs_that_cannot_be_are_refused_together_before_any_is_started():
    methods = {
        "opd": {},
        "bad": {"method": "opd", "rollout": {"temprature": 1}},
        "worse": {"method": "opd", "optimizer": {"num_minibatches": 999}},
    }
    with pytest.raises(ConfigError) as caught:
        cells_of(study(methods=methods, seeds=[0, 1]))
    assert "bad of pair, seed 0: unknown key 'rollout.temprature'" in str(caught.value)
    assert "worse of pair" in str(caught.value)
    assert str(caught.value).count("temprature") == 1


def test_a_complaint_about_a_file_names_its_line_and_overrides_lie_over_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": BASE, "methods": {"opd": {}}}) + "paralel: 2\n")
    with pytest.raises(ConfigError, match=r"line \d+: unknown key 'paralel' \(did you mean 'parallel'\?\)"):
        load_study(path)
    path.write_text(yaml.safe_dump({"base": BASE, "methods": {"opd": {}}}))
    assert load_study(path).folder == Path("studies/mine")
    found = load_study(path, ("parallel=3", "seeds=[4,5]", "base.max_steps=7"))
    assert (found.parallel, found.seeds) == (3, (4, 5))
    assert cells_of(found)[0].config.max_steps == 7


def test_a_study_extends_another_in_all_but_its_methods(tmp_path):
    parent = {
        "base": {**BASE, "max_steps": 9, "learning_rate": 1e-6}, "methods": {"opd": {}}, "grid": {"max_steps": [1]},
        "seeds": [3, 4], "parallel": 2,
    }  # fmt: skip
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump(parent))
    child = {"extends": "parent.yaml", "base": {"max_steps": 5}, "methods": {"sft": {}}, "seeds": [7]}
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(child))
    found = load_study(tmp_path / "child.yaml")
    assert (list(found.methods), found.grid, found.seeds, found.parallel) == (["sft"], {}, (7,), 2)
    (cell,) = cells_of(found)
    assert (cell.config.max_steps, cell.config.optimizer.learning_rate) == (5, 1e-6)
    assert found.folder == Path("studies/child")
    (tmp_path / "parent.yaml").write_text("extends: child.yaml")
    with pytest.raises(ConfigError, match="in turn"):
        load_study(tmp_path / "child.yaml")
    (tmp_path / "parent.yaml").write_text(f"extends: ../{tmp_path.name}/child.yaml")
    with pytest.raises(ConfigError, match="in turn"):
        load_study(tmp_path / "child.yaml")
    (tmp_path / "child.yaml").write_text("extends: absent.yaml")
    with pytest.raises(ConfigError, match=r"absent.yaml: no such"):
        load_study(tmp_path / "child.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_that_ships_parses_and_all_of_its_runs_are_possible(path):
    assert cells_of(load_study(path))
