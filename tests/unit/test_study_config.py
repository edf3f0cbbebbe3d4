from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stableopd.errors import ConfigError
from stableopd.study.cells import cells_of
from stableopd.study.config import StudyConfig, load_study, merged
from stableopd.study.outcome import Outcome, read_outcomes
from stableopd.study.running import _without_twins, settings_digest

ROOT = Path(__file__).resolve().parents[2]
BASE = {"student": {"model_name_or_path": "s"}, "teacher": {"model_name_or_path": "t"}, "data": {"path": "d.jsonl"}}
WORLD = {"name": "toy", "teachers": {"a": {"seed": 1}, "b": {"habit": "clean", "seed": 2}}}


def study(**given) -> StudyConfig:
    return StudyConfig(**{"base": BASE, "methods": {"opd": {}}, "output_dir": "out", **given})


def test_every_method_meets_every_pair_and_seed_and_the_seeds_go_last():
    cells = cells_of(study(methods={"opd": {}, "sft": {}}, pairs={"p": {}, "q": {}}, seeds=[0, 7]))
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
        methods={"opd": {}, "stableopd": {}, "sft": {}}, pairs={"p": {}, "q": {}}, compare_with="opd",
        grid={"seed": [1, 2]}, grid_methods=["sft"],
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
            pairs={"p": {}, "q": {}},
        )
    )
    by_method = {(cell.method, cell.pair): cell for cell in cells}
    first = by_method["opd", "p"]
    assert first.cold_start.method == "sft"
    assert first.cold_start.data.path == "cold.jsonl"
    assert first.cold_start.student.model_name_or_path == "s"
    assert first.config.student.model_name_or_path == "out/cold_start/p/seed-0/checkpoints/step-000030"
    assert first.config.data.path == "d.jsonl"
    assert by_method["stableopd", "p"].cold_start == first.cold_start
    assert by_method["opd", "q"].cold_start.run_dir != first.cold_start.run_dir
    assert by_method["sft", "p"].cold_start is None
    assert by_method["sft", "p"].config.student.model_name_or_path == "s"


def test_a_cold_start_of_adapters_leaves_a_whole_model_or_is_refused():
    lora = {"student": {"model_name_or_path": "s", "lora": {"r": 2, "merge": True}}}
    cell = cells_of(study(base={**BASE, **lora}, cold_start={"max_steps": 3}))[0]
    assert cell.config.student.model_name_or_path == "out/cold_start/pair/seed-0/merged"
    lora["student"]["lora"]["merge"] = False
    with pytest.raises(ConfigError, match="the cold start trains adapters"):
        cells_of(study(base={**BASE, **lora}, cold_start={"max_steps": 3}))


def test_a_world_makes_the_pairs_and_says_where_they_are():
    methods = {"sft": {"data": {"gold_path": "{world}/data/gold_pool.jsonl"}}}
    cells = cells_of(study(base={}, world=WORLD, methods=methods, seeds=[3]))
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
        arm="sft", pair="q", seed=0, digest="", figures={"late_accuracy": 0.5}, verdict="healthy", headline=""
    )
    left = _without_twins(made, cells, [done])
    assert ("sft", "p") not in [(cell.method, cell.pair) for group in left for cell in group]
    (given,) = read_outcomes(tmp_path / "results.jsonl")
    assert (given.key, given.figures) == (("sft", "p", 0), {"late_accuracy": 0.5})
    assert given.digest == settings_digest(made, next(c for c in cells if (c.method, c.pair) == ("sft", "p")))


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
    world = {**WORLD, "teachers": {"a": {"seed": 9}}}
    assert digest(world=WORLD) == digest(world=WORLD, output_dir="moved")
    assert digest(world=WORLD) != digest(world=world)
    pool = {**BASE, "data": {"gold_path": "{world}/data/gold_pool.jsonl"}}
    assert digest(world=WORLD, base=pool) == digest(world=WORLD, base=pool, output_dir="moved")
    assert digest(world=WORLD, base=pool) != digest(world=WORLD)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"methods": {}}, "methods"),
        ({"compare_with": "opdd"}, "did you mean 'opd'"),
        ({"grid_methods": ["sft"]}, "none of the methods"),
        ({"seeds": [1, 1]}, "a seed twice"),
        ({"world": WORLD, "pairs": {"p": {}}}, "both given"),
        ({"methods": {"opd": {"start": "nowhere"}}}, "cold_start or student"),
        ({"methods": {"opd": {"grid": {"lambda_gold": 1.0}}}}, "maps keys to lists"),
        ({"methods": {"../opd": {}}}, "methods"),
        ({"world": {**WORLD, "teachers": {"a": {"habit": "lazy"}}}}, "world.teachers.a.habit"),
        ({"sedes": [1]}, "did you mean 'seeds'"),
    ],
)
def test_a_study_that_cannot_be_is_refused_with_the_reason(given, words):
    with pytest.raises(ConfigError, match=words):
        study(**given)


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
        "base": {**BASE, "max_steps": 9, "learning_rate": 1e-6}, "methods": {"opd": {}}, "grid": {"seed": [1]},
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
    (tmp_path / "child.yaml").write_text("extends: absent.yaml")
    with pytest.raises(ConfigError, match=r"absent.yaml: no such"):
        load_study(tmp_path / "child.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_that_ships_parses_and_all_of_its_runs_are_possible(path):
    assert cells_of(load_study(path))
