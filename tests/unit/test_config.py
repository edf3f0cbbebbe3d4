"""A wrong configuration cannot be expressed, and the complaint says where, what, and what was meant."""

from __future__ import annotations

import pytest
import yaml

from stableopd.config import FLAT_NAMES, PRESETS, StableOPDConfig
from stableopd.config_files import check_resumable, dump_config, flatten, load_config
from stableopd.errors import ConfigError, StableOPDError


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("method", PRESETS)
def test_a_method_fills_the_coefficients_of_the_one_objective(method):
    objective = StableOPDConfig(method=method).objective
    found = {name: getattr(objective, name).coef for name in PRESETS[method]}
    assert found == PRESETS[method]


def test_a_coefficient_that_is_given_wins_over_the_preset():
    config = StableOPDConfig(method="opd", objective={"gold": {"coef": 0.3}})
    assert (config.objective.distill.coef, config.objective.gold.coef, config.objective.reference.coef) == (1, 0.3, 0)


def test_the_papers_names_are_aliases():
    config = StableOPDConfig(lambda_gold=0.25, beta_kl=0.01)
    assert (config.objective.gold.coef, config.objective.reference.coef) == (0.25, 0.01)


@pytest.mark.parametrize(("name", "dotted"), FLAT_NAMES.items())
def test_every_flat_name_leads_to_a_real_setting(name, dotted):
    assert dotted in flatten(StableOPDConfig().model_dump())


def test_trl_names_are_put_where_they_belong():
    config = StableOPDConfig(learning_rate=2e-6, max_completion_length=77, report_to="none", save_steps=5)
    assert config.optimizer.learning_rate == 2e-6
    assert config.rollout.max_completion_length == 77
    assert config.logging.report_to == ()
    assert config.checkpoint.every_steps == 5


def test_a_setting_given_under_both_of_its_names_is_refused():
    with pytest.raises(ConfigError, match=r"'learning_rate' and 'optimizer\.learning_rate' are the same"):
        StableOPDConfig(learning_rate=1e-6, optimizer={"learning_rate": 1e-5})


def test_an_unknown_key_names_the_nearest_known_one_and_its_line(write):
    path = write("method: opd\nrollout:\n  num_prompts: 8\n  max_completion_lenght: 5\n")
    with pytest.raises(ConfigError, match=r"run.yaml, line 4: .*did you mean 'rollout.max_completion_length'"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rollout: {num_prompts: 0}", r"line 1: rollout.num_prompts: .*greater than or equal to 1"),
        ("learning_rate: fast", r"line 1: optimizer.learning_rate: .*number.*'fast'"),
        ("seed: 1\nlambda_gold: -1", r"line 2: objective.gold.coef: .*greater than or equal to 0"),
        ("optimizer: {learning_rate: .nan}", r"optimizer.learning_rate"),
        ("method: ppo", r"line 1: method: .*'sft', 'opd', 'stableopd' or 'grpo'"),
        ("rollout: 5", r"line 1: rollout"),
        ("max_steps: 10\noptimizer: {warmup_steps: 10}", r"warmup_steps \(10\) leaves none of max_steps"),
        ("method: opd\nobjective: {distill: {coef: 0}}", r"nothing to train on"),
        ("rollout: {num_prompts: 2}\noptimizer: {num_minibatches: 3}", r"more than the 2 prompts"),
        ("per_device_train_batch_size: 4", r"set rollout.num_prompts"),
        ("health: {thresholds: {loop_warnin: 0.1}}", r"did you mean 'loop_warning'"),
        ("health: {thresholds: {loop_warning: 2.0}}", r"loop_warning"),
        ("1: 2", r"line 1: the key '1' is not a name"),
        ("studnet: {dtype: auto}", r"did you mean 'student'"),
        ("seed: 1\nseed: 2", r"line 2: the key 'seed' is given twice"),
        ("a: [1", r"line \d+, column \d+: broken YAML"),
        ("- 1\n- 2", r"mapping of keys to values, not a list"),
        ("student: !!python/object/apply:os.system ['true']", r"broken YAML"),
    ],
)
def test_bad_files_are_refused_with_the_place_and_the_reason(write, text, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(write(text))


def test_all_problems_are_told_at_once(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write("seed: -1\nmax_steps: 0\n"))
    assert "line 1: seed" in str(caught.value)
    assert "line 2: max_steps" in str(caught.value)


def test_a_missing_file_and_a_binary_file_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: no such configuration file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_overrides_are_laid_over_the_file(write):
    path = write("learning_rate: 1e-3\nrollout: {num_prompts: 8}")
    config = load_config(path, ["optimizer.learning_rate=1e-6", "rollout.num_generations=2", "beta_kl=0.5"])
    assert config.optimizer.learning_rate == 1e-6
    assert (config.rollout.num_prompts, config.rollout.num_generations) == (8, 2)
    assert config.objective.reference.coef == 0.5
    assert load_config(path, ["learning_rate=1e-6"]).optimizer.learning_rate == 1e-6


def test_a_bad_override_is_not_blamed_on_a_line_of_the_file(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write("max_steps: 5"), ["max_steps=0"])
    assert "run.yaml" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.distill.topk=0", "objective.distill.topk=0 (command line): input should be greater"),
        ("learning_rate=fast", "learning_rate=fast (command line): input should be a valid number"),
        ("rollout.num_promts=2", "rollout.num_promts=2 (command line): unknown key 'rollout.num_promts'"),
        ("student.lora=yes please", "student.lora=yes please (command line): is a section"),
        ("objective.distill={topk: 0}", "objective.distill={topk: 0} (command line): input should be greater"),
        (
            "objective.distill.support=union",
            "run.yaml, line 2 with objective.distill.support=union (command line): objective.distill: support is",
        ),
    ],
)  # fmt: skip
def test_a_bad_override_is_told_as_it_was_typed(write, override, expected):
    path = write("seed: 1\nobjective: {distill: {coef: 1.0}}")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["max_steps=9", override])
    assert expected in str(caught.value)
    assert ("run.yaml" in str(caught.value)) == ("run.yaml" in expected)


def test_a_section_given_as_a_value_and_a_number_that_is_none_are_told_in_plain_words(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write("student: {lora: true}\nobjective: {distill: {beta: .nan, coef: .nan}}"))
    section, beta, coef = str(caught.value).splitlines()
    assert section.endswith("student.lora: is a section: give its settings one by one, as a mapping (got True)")
    for line in (beta, coef):
        assert line.endswith("input should be a finite number (got nan)")


@pytest.mark.parametrize("override", ["seed", "=3", "seed.x=3", "sead=3", "seed=[1"])
def test_a_bad_override_is_refused(write, override):
    with pytest.raises(ConfigError):
        load_config(write("seed: 1"), [override])


def test_a_configuration_survives_the_way_through_its_file(write):
    config = StableOPDConfig(method="opd", learning_rate=3e-5, health={"thresholds": {"window": 3}})
    path = write(dump_config(config))
    assert load_config(path) == config
    assert yaml.safe_load(path.read_text())["objective"]["gold"]["coef"] == 0.0


def test_the_python_facade_complains_as_the_file_does():
    with pytest.raises(StableOPDError, match="did you mean 'learning_rate'"):
        StableOPDConfig(learning_rat=1e-6)


def test_resuming_with_another_learning_rate_is_refused_and_more_steps_are_not(write):
    path = write(dump_config(StableOPDConfig(learning_rate=1e-5, max_steps=10)))
    check_resumable(path, StableOPDConfig(learning_rate=1e-5, max_steps=20, save_steps=3))
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 1e-05 -> 2e-05"):
        check_resumable(path, StableOPDConfig(learning_rate=2e-5, max_steps=10))


def test_off_is_off_even_where_yaml_reads_it_as_false(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("health: {actions: off}\n")
    assert load_config(path).health.actions == "off"
    assert load_config(path, ["health.actions=off"]).health.actions == "off"
