"""`stableopd eval` as a user runs it, on real checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from stableopd.benchmarking import running
from stableopd.benchmarking import subject as subject_module
from stableopd.benchmarking.cache import key_of
from stableopd.benchmarking.loading import load_benchmark
from stableopd.benchmarking.results import EvalSettings
from stableopd.benchmarking.running import evaluate_model, read_result
from stableopd.benchmarking.subject import _UNRELATED, Subject, _of_adapters, load_subject, resolve_model
from stableopd.cli import main
from stableopd.errors import ConfigError, DataError, ModelError, RunFolderError
from stableopd.recorder import lock_folder
from stableopd.rollout.hf import HFEngine

JUDGE = "stableopd.toy.task:judge"


@pytest.fixture
def settings(checkpoints, dataset) -> EvalSettings:
    return EvalSettings(
        model=str(checkpoints / "student"),
        benchmark=str(dataset / "validation.jsonl"),
        num_samples=4,
        max_completion_length=10,
        judge=JUDGE,
        batch_size=8,
        num_problems=12,
        seed=3,
    )


def with_(settings: EvalSettings, **changes) -> EvalSettings:
    from dataclasses import replace

    return replace(settings, **changes)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Iterator[Callable[..., Done]]:
    """The command as the shell calls it, in `tmp_path`, but in this process: one of its own takes its time to start."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP)}

    def command(*arguments: object) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["stableopd", "eval", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    yield command
    for name, handler in handlers.items():
        signal.signal(name, handler)


def generations(monkeypatch) -> list[int]:
    """Numbers of completions that the engine is asked for from now on."""
    asked: list[int] = []
    generate = HFEngine.generate

    def counted(self, examples, sampling, **keywords):
        asked.append(len(examples) * sampling.num_generations)
        return generate(self, examples, sampling, **keywords)

    monkeypatch.setattr(HFEngine, "generate", counted)
    return asked


def test_a_model_is_asked_and_judged_and_everything_is_stored(settings, tmp_path):
    result = evaluate_model(settings, tmp_path)
    assert len(result.prompts) == 12
    figures = result.figures
    assert list(figures) == [
        "avg@4", "pass@2", "pass@4", "maj@4", "length", "truncated_fraction", "repetition_rate",
    ]  # fmt: skip
    right = [sum(prompt.right) / 4 for prompt in result.prompts]
    assert figures["avg@4"].value == pytest.approx(sum(right) / 12)
    assert figures["pass@4"].value == pytest.approx(sum(share > 0 for share in right) / 12)
    assert figures["avg@4"].low <= figures["avg@4"].value <= figures["avg@4"].high
    (stored,) = tmp_path.rglob("result-*.json")
    assert read_result(stored) == result
    assert json.loads(stored.read_text())["settings"]["temperature"] == 0.6
    lines = [json.loads(line) for line in (stored.parent / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 48
    assert max(line["num_tokens"] for line in lines) <= 10


def test_what_was_generated_is_not_generated_again(settings, tmp_path, monkeypatch):
    first = evaluate_model(settings, tmp_path)
    asked = generations(monkeypatch)
    again = evaluate_model(with_(settings, batch_size=3), tmp_path)
    assert (again.prompts, again.generation_s) == (first.prompts, 0.0)
    fewer = evaluate_model(with_(settings, num_samples=2), tmp_path)
    assert [prompt.right for prompt in fewer.prompts] == [prompt.right[:2] for prompt in first.prompts]
    other = evaluate_model(with_(settings, judge="exact"), tmp_path)
    assert [prompt.lengths for prompt in other.prompts] == [prompt.lengths for prompt in first.prompts]
    assert asked == []
    more = evaluate_model(with_(settings, num_samples=5), tmp_path)
    assert sum(asked) == 12  # completions: the fifth of each prompt alone
    assert evaluate_model(with_(settings, num_samples=5), tmp_path / "afresh").prompts == more.prompts


@pytest.mark.parametrize("change", [{"seed": 4}, {"temperature": 0.9}, {"max_completion_length": 9}, {"top_p": 0.5}])
def test_answers_are_kept_apart_wherever_they_could_differ(settings, tmp_path, monkeypatch, change):
    evaluate_model(settings, tmp_path)
    asked = generations(monkeypatch)
    evaluate_model(with_(settings, **change), tmp_path)
    assert sum(asked) == 48


def test_other_weights_are_another_model(settings, checkpoints, tmp_path, monkeypatch):
    evaluate_model(settings, tmp_path)
    asked = generations(monkeypatch)
    evaluate_model(with_(settings, model=str(checkpoints / "teacher")), tmp_path)
    assert sum(asked) == 48


@pytest.mark.parametrize(
    ("file", "changes"),
    [("generation_config.json", {"eos_token_id": [3, 4]}), ("config.json", {"rms_norm_eps": 0.5})],
)
def test_what_lies_beside_the_weights_makes_another_model(settings, tmp_path, monkeypatch, file, changes):
    copy = tmp_path / "model"
    shutil.copytree(settings.model, copy)
    mine = with_(settings, model=str(copy))
    first = evaluate_model(mine, tmp_path / "evals")
    asked = generations(monkeypatch)
    (copy / "README.md").write_text("more about it")
    evaluate_model(mine, tmp_path / "evals")
    assert asked == []
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    other = evaluate_model(mine, tmp_path / "evals")
    assert sum(asked) == 48
    assert other.weights_digest == first.weights_digest
    assert [prompt.lengths for prompt in other.prompts] != [prompt.lengths for prompt in first.prompts]


def test_adapters_answer_as_the_model_they_were_merged_into(settings, checkpoints, tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoints / "student")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(0, 2.0, generator=torch.Generator().manual_seed(number))
    adapted.save_pretrained(tmp_path / "adapters")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    for folder in ("adapters", "merged"):
        tokenizer.save_pretrained(str(tmp_path / folder))
    results = {
        folder: evaluate_model(with_(settings, model=str(folder)), tmp_path / "evals")
        for folder in (tmp_path / "adapters", tmp_path / "merged", checkpoints / "student")
    }
    adapters, merged, without = (result.prompts for result in results.values())
    assert adapters == merged
    assert adapters != without


@pytest.fixture
def adapters(settings, checkpoints, tmp_path, tokenizer) -> Callable[..., EvalSettings]:
    """Folders of adapters with the same weights, whatever else is said of them."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    def made(name: str, **changes) -> EvalSettings:
        model = AutoModelForCausalLM.from_pretrained(checkpoints / "student")
        modules = ["q_proj", "v_proj", "o_proj"]
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=1, target_modules=modules))
        with torch.no_grad():
            for number, (key, parameter) in enumerate(adapted.named_parameters()):
                if "lora_" in key:
                    parameter.normal_(0, 2.0, generator=torch.Generator().manual_seed(number))
        adapted.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(str(tmp_path / name))
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return with_(settings, model=str(tmp_path / name))

    return made


def test_adapters_of_equal_weights_and_other_scale_do_not_share_answers(adapters, checkpoints, tmp_path):
    shutil.copytree(checkpoints / "student", tmp_path / "base")
    weak, strong = adapters("weak"), adapters("strong", lora_alpha=64)
    moved = adapters("moved", base_model_name_or_path=str(tmp_path / "base"))
    one, other, same = (load_subject(asked) for asked in (weak, strong, moved))
    assert one.weights_digest == other.weights_digest == same.weights_digest
    assert one.key() != other.key()
    assert one.key() == same.key()
    assert (
        evaluate_model(weak, tmp_path, subject=one).prompts != evaluate_model(strong, tmp_path, subject=other).prompts
    )


def test_a_model_without_adapters_keeps_the_key_that_its_answers_have(settings):
    subject = load_subject(settings)
    config = {key: repr(value) for key, value in subject.model.config.to_dict().items() if key not in _UNRELATED}
    vocabulary = subject.tokenizer.get_vocab()
    assert subject.key() == key_of({"config": config, "ends": sorted(subject.ends), "vocabulary": vocabulary})
    assert _of_adapters({"target_modules": {"b", "a", "c"}, "r": 2}) == {"target_modules": "['a', 'b', 'c']", "r": "2"}


@pytest.mark.parametrize("kind", ["stop_strings", "stop_token_ids"])
def test_answers_end_where_a_run_ends_them_and_are_kept_apart(settings, tmp_path, tokenizer, monkeypatch, kind):
    plain = evaluate_model(settings, tmp_path)
    texts = [json.loads(line)["text"] for path in tmp_path.rglob("completions.jsonl") for line in path.open()]
    common = max("0123456789", key="".join(text[:-1] for text in texts).count)
    (token,) = tokenizer.encode(common, add_special_tokens=False)
    asked = generations(monkeypatch)
    stopped = evaluate_model(with_(settings, **{kind: (common if kind == "stop_strings" else token,)}), tmp_path)
    assert sum(asked) == 48
    assert stopped.num_tokens < plain.num_tokens
    for prompt, before in zip(stopped.prompts, plain.prompts, strict=True):
        assert all(length <= longer for length, longer in zip(prompt.lengths, before.lengths, strict=True))
    (stored,) = [path for path in tmp_path.rglob("result-*.json") if read_result(path) == stopped]
    kept = [json.loads(line)["text"] for line in (stored.parent / "completions.jsonl").open()]
    assert all(common not in text[:-1] for text in kept)
    assert any(text.endswith(common) for text in kept) == (kind == "stop_strings")
    assert evaluate_model(settings, tmp_path).prompts == plain.prompts
    assert sum(asked) == 48


def test_results_that_were_stored_before_there_were_stops_and_messages_are_read(settings, tmp_path):
    result = evaluate_model(settings, tmp_path)
    (stored,) = tmp_path.rglob("result-*.json")
    record = json.loads(stored.read_text())
    del record["failure_message"]
    for name in ("stop_strings", "stop_token_ids", "split"):
        del record["settings"][name]
    stored.write_text(json.dumps(record))
    assert read_result(stored) == result


def test_a_folder_of_answers_has_one_writer_at_a_time(settings, tmp_path):
    first = evaluate_model(settings, tmp_path)
    (stored,) = tmp_path.rglob("result-*.json")
    with lock_folder(stored.parent), pytest.raises(RunFolderError, match="another process"):
        evaluate_model(settings, tmp_path)
    assert evaluate_model(settings, tmp_path).prompts == first.prompts


def test_an_evaluation_that_was_cut_off_goes_on_to_the_same_answers(settings, tmp_path, monkeypatch):
    small = with_(settings, batch_size=2)
    whole = evaluate_model(small, tmp_path / "whole")
    generate, calls = HFEngine.generate, []

    def failing(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *arguments, **keywords)

    monkeypatch.setattr(HFEngine, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(small, tmp_path / "cut")
    (path,) = (tmp_path / "cut").rglob("completions.jsonl")
    assert 0 < len(path.read_text().splitlines()) < 48
    first, *rest = path.read_text()[:-7].split("\n")  # the last line is torn
    path.write_text("\n".join(["{" + first, "[1]", *rest]))  # and the first is damaged
    assert evaluate_model(small, tmp_path / "cut").prompts == whole.prompts


def test_greedy_answers_do_not_depend_on_the_seed(settings, tmp_path, monkeypatch):
    greedy = with_(settings, temperature=0.0, num_samples=1)
    first = evaluate_model(greedy, tmp_path)
    asked = generations(monkeypatch)
    assert evaluate_model(with_(greedy, seed=9), tmp_path).prompts == first.prompts
    assert asked == []
    assert next(iter(first.figures)) == "accuracy"


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path, checkpoints):
    for step in (9, 1_000_000, 10):
        (tmp_path / "run" / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / ".new-step-2000000").mkdir()  # half written
    assert resolve_model(str(tmp_path / "run")) == str(tmp_path / "run" / "checkpoints" / "step-1000000")
    assert resolve_model(str(checkpoints / "student")) == str(checkpoints / "student")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match="without checkpoints"):
        resolve_model(str(tmp_path / "empty"))


def test_questions_without_room_for_an_answer_are_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="lower it"):
        evaluate_model(with_(settings, max_completion_length=100_000), tmp_path)
    with pytest.raises(DataError, match="too long"):
        evaluate_model(with_(settings, max_completion_length=254), tmp_path)


def test_the_command_prints_a_table_or_json_and_takes_several_benchmarks(checkpoints, dataset, tmp_path, run):
    copy = tmp_path / "more.jsonl"
    copy.write_text(json.dumps({"question": "1234:", "answer": "0"}) + "\n")
    both = ["--benchmark", dataset / "validation.jsonl", "--benchmark", copy]
    common = [checkpoints / "student", *both, "--samples", 2, "--max-completion-length", 8, "--judge", JUDGE]
    table = run(*common)
    assert table.returncode == 0, table.stderr
    for words in ("validation", "more", "avg@2", "pass@2", "maj@2", "95% interval", "mean of 2 benchmarks", "seed 0"):
        assert words in table.stdout
    document = run(*common, "--json")
    found = json.loads(document.stdout)
    assert [result["benchmark"] for result in found] == ["validation", "more"]
    assert found[0]["generation_s"] == 0.0
    assert found[0]["figures"]["avg@2"]["value"] == pytest.approx(
        sum(sum(prompt["right"]) for prompt in found[0]["prompts"]) / (2 * len(found[0]["prompts"]))
    )


@pytest.mark.slow
def test_killed_in_the_middle_the_command_goes_on(checkpoints, dataset, tmp_path, run):
    arguments = [
        checkpoints / "teacher", "--benchmark", dataset / "validation.jsonl", "--samples", 4, "--judge", JUDGE,
        "--max-completion-length", 60, "--batch-size", 4, "--num-prompts", 16,
    ]  # fmt: skip
    command = [sys.executable, "-m", "stableopd", "eval", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("completions.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (left,) = tmp_path.rglob("completions.jsonl")
    num_left = len(left.read_text().splitlines())
    resumed = json.loads(run(*arguments, "--json").stdout)[0]["prompts"]
    assert 0 < num_left < 4 * len(resumed)
    assert resumed == json.loads(run(*arguments, "--json", "--out", "fresh").stdout)[0]["prompts"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/model", "--benchmark", "{data}"], "no folder"),
        (["{model}", "--benchmark", "math50"], "did you mean 'math500'"),
        (["{model}", "--benchmark", "absent.jsonl"], "does not exist"),
        (["{model}", "--benchmark", "{data}", "--judge", "no.such:judge"], "--judge"),
        (["{model}", "--benchmark", "{data}", "--dtype", "int3"], "--dtype"),
        (["{model}", "--benchmark", "{data}", "--answer-column", "nope"], "--answer-column"),
        (["{model}", "--benchmark", "{data}", "--device", "nowhere"], "--device"),
        (["{model}", "--benchmark", "{data}", "--chat-template-kwargs", "[1]"], "JSON object"),
        (["{model}", "--benchmark", ""], "no name"),
        (["{model}", "--benchmark", "."], "no name"),
        (["{model}", "--benchmark", "math500="], "no copy"),
        (["{model}", "--benchmark", "{data}", "--benchmark", "{data}"], "given twice"),
        (["{model}", "--benchmark", "{data}", "--benchmark", "{beside}/validation.jsonl"], "both called 'validation'"),
        (["{model}", "--benchmark", "{folder}", "--split", "nope"], "--split"),
        (["{model}", "--benchmark", "math500", "--split", "train"], "leave it out"),
        (["{model}", "--benchmark", "{data}", "--temperature", "inf"], "--temperature"),
        (["{model}", "--benchmark", "{data}", "--temperature", "nan"], "--temperature"),
        (["{model}", "--benchmark", "{data}", "--temperature", "1e-40"], "--temperature"),
        (["{model}", "--benchmark", "{data}", "--top-p", "nan"], "--top-p"),
        (["{model}", "--benchmark", "{data}", "--top-p", "0"], "--top-p"),
        (["{model}", "--benchmark", "{data}", "--judge-timeout", "inf"], "--judge-timeout"),
        (["{model}", "--benchmark", "{data}", "--judge-timeout", "nan"], "--judge-timeout"),
        (["{model}", "--benchmark", "{data}", "--samples", "100001"], "--samples"),
        (["{model}", "--benchmark", "{data}", "--seed", "9223372036854775808"], "--seed"),
        (["{model}", "--benchmark", "{data}", "--stop-strings", ""], "--stop-strings"),
        (["{model}", "--benchmark", "{data}", "--stop-token-ids", "-1"], "--stop-token-ids"),
        (["{model}", "--benchmark", "{data}", "-o", "{folder}"], "is a folder"),
        (["{model}", "--benchmark", "{data}", "-o", "{beside}/pipe"], "--json"),
        (["{model}", "--benchmark", "{data}", "-o", "{data}/result.json"], "not a directory"),
        (["{model}", "--benchmark", "{data}", "-o", "/proc/nowhere/result.json"], "cannot be written"),
        (["{model}", "--benchmark", "{data}", "-o", "evals"], "another name"),
        (["{model}", "--benchmark", "{data}", "--out", "{data}"], "is a file"),
        (["{model}", "--benchmark", "{data}", "--out", "/proc/nowhere"], "cannot be written"),
    ],
)
def test_bad_input_is_one_message_before_the_model_is_loaded_and_leaves_nothing(
    checkpoints, dataset, tmp_path, tmp_path_factory, run, monkeypatch, arguments, words
):
    loaded = []
    load_model = subject_module.load_model
    monkeypatch.setattr(subject_module, "load_model", lambda *given: loaded.append(given) or load_model(*given))
    beside = tmp_path_factory.mktemp("beside")
    shutil.copy(dataset / "validation.jsonl", beside)
    os.mkfifo(beside / "pipe")
    places = {"model": checkpoints / "student", "data": dataset / "validation.jsonl", "folder": dataset}
    done = run(*(argument.format(**places, beside=beside) for argument in arguments))
    assert done.returncode == 2
    assert words in " ".join(done.stderr.replace("\u2502", " ").split())
    assert "Traceback" not in done.stderr
    assert "Errno" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert not loaded or "--device" in arguments


def test_a_split_of_a_folder_is_asked_and_stops_reach_the_settings(checkpoints, dataset, run):
    asked = [checkpoints / "student", "--benchmark", dataset, "--split", "validation", "--max-completion-length", 4]
    asked += ["--stop-strings", ";", "--stop-strings", "=", "--stop-token-ids", 3, "--stop-token-ids", 4, "--json"]
    (found,) = json.loads(run(*asked).stdout)
    assert len(found["prompts"]) == len((dataset / "validation.jsonl").read_text().splitlines())
    settings = found["settings"]
    assert (settings["split"], settings["stop_strings"], settings["stop_token_ids"]) == (
        "validation",
        [";", "="],
        [3, 4],
    )


def test_an_error_of_the_system_has_no_number(checkpoints, dataset, run, monkeypatch):
    def full(*given, **options):
        raise OSError(28, "No space left on device")  # as a write says it, without the file

    monkeypatch.setattr(running, "evaluate_model", full)
    done = run(checkpoints / "student", "--benchmark", dataset / "validation.jsonl")
    assert done.returncode == 2
    assert "no space left on device. Choose another place" in " ".join(done.stderr.split())
    assert "Errno" not in done.stderr


def test_a_judge_that_fails_on_every_answer_is_told_and_ends_with_1(checkpoints, dataset, tmp_path, run, monkeypatch):
    (tmp_path / "broken.py").write_text(
        "def always(completion, answer):\n    raise KeyError('no \\x1b[31msuch key')\n"
        "def sometimes(completion, answer):\n    return always(completion, answer) if answer[-1] in '02468' else True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = [checkpoints / "student", "--benchmark", dataset / "validation.jsonl", "--max-completion-length", 4]
    done = run(*asked, "--judge", "broken:always", "-o", "result.json")
    assert done.returncode == 1
    for shown in (done.stdout, done.stderr):
        assert "KeyError: 'no" in " ".join(shown.split())
        assert "\x1b[31m" not in shown
    assert "gave no verdict on any answer" in " ".join(done.stderr.split())
    (stored,) = json.loads((tmp_path / "result.json").read_text())
    assert stored["failure_message"].startswith("KeyError")
    some = run(*asked, "--judge", "broken:sometimes")
    assert (some.returncode, some.stderr) == (0, "")
    assert "KeyError" in some.stdout


def test_greedy_answers_are_asked_for_once_whatever_a_benchmark_usually_gets(
    dataset, checkpoints, tmp_path, run, monkeypatch
):
    from stableopd.benchmarking import loading

    load = loading.load_benchmark
    monkeypatch.setattr(loading, "load_benchmark", lambda *a, **given: replace(load(*a, **given), num_samples=3))
    asked = [checkpoints / "student", "--benchmark", dataset / "validation.jsonl", "--num-prompts", 2, "--json"]
    asked += ["--max-completion-length", 4]
    numbers = {
        temperature: json.loads(run(*asked, "--temperature", temperature).stdout)[0]["settings"]["num_samples"]
        for temperature in (0.0, 0.6)
    }
    assert numbers == {0.0: 1, 0.6: 3}


def test_the_model_is_loaded_once_for_all_benchmarks_and_after_the_judges(
    dataset, checkpoints, tmp_path, run, monkeypatch
):
    loaded = []
    load_model = subject_module.load_model
    monkeypatch.setattr(subject_module, "load_model", lambda *given: loaded.append(given) or load_model(*given))
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": "12:", "answer": "0"}))
    common = [checkpoints / "student", "--benchmark", dataset / "validation.jsonl", "--benchmark", "other.jsonl"]
    common += ["--greedy", "--num-prompts", 2, "--max-completion-length", 4, "--json"]
    results = json.loads(run(*common).stdout)
    assert [(one["benchmark"], one["settings"]["temperature"]) for one in results] == [
        ("validation", 0.6), ("validation", 0.0), ("other", 0.6), ("other", 0.0),
    ]  # fmt: skip
    assert len(loaded) == 1
    assert run(*common, "--judge", "no.such:judge").returncode == 2
    assert len(loaded) == 1


def test_greedy_answers_have_a_mean_of_their_own(settings, dataset, tmp_path, capsys):
    from rich.console import Console

    from stableopd.benchmarking.view import print_results

    results = [
        evaluate_model(with_(settings, num_samples=k, temperature=temperature), tmp_path)
        for k, temperature in ((4, 0.6), (1, 0.0))
    ]
    print_results(Console(width=120), results)
    shown = capsys.readouterr().out
    assert "validation, 12 questions, greedy" in shown
    assert "mean of" not in shown
    print_results(Console(width=120), [*results, results[1]])
    mean = f"mean of 2 benchmarks, greedy: {results[1].accuracy.value:.1%}"
    assert mean in capsys.readouterr().out


def test_the_benchmarks_questions_go_through_the_chat_template_where_there_is_one(settings, tmp_path, tokenizer):
    chatty = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="$", pad_token="_")
    chatty.chat_template = (
        "{% for m in messages %}:{{ m.content }}{% endfor %}{% if add_generation_prompt %};{% endif %}"
    )
    subject = load_subject(settings)
    chatting = Subject(model=subject.model, tokenizer=chatty, weights_digest="", ends=frozenset())
    benchmark = load_benchmark(settings.benchmark, num_problems=2)
    asked = running._examples(benchmark, settings, chatting)
    assert [one.prompt for one in asked] == [f":{problem.prompt};" for problem in benchmark.problems]
    plain = running._examples(benchmark, with_(settings, chat=False), chatting)
    assert [one.prompt for one in plain] == [problem.prompt for problem in benchmark.problems]
