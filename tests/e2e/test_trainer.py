"""The trainer from Python, on the kinds of models and data that people bring."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stableopd import StableOPDConfig, StableOPDTrainer
from stableopd.checkpoint import checkpoints_in
from stableopd.errors import ConfigError, DataError, ModelError, TrainingError
from stableopd.health import judge_run
from stableopd.protocols import Callback

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = [f"What is {a} plus {b}?" for a in range(5) for b in range(4)]


def chat_rows() -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": f"It is {index // 4 + index % 4}."}],
            "answer": f"It is {index // 4 + index % 4}.",
        }
        for index, question in enumerate(QUESTIONS)
    ]


@pytest.fixture(scope="module")
def chat_tokenizer():
    """A byte-pair tokenizer with a chat template whose turns end otherwise than its texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([*QUESTIONS, "It is 4. user assistant\n"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen(tokenizer, seed: int, *, tied: bool = True, extra_rows: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer) + extra_rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied,
            max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip


def llama(tokenizer, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def arguments(tmp_path, **changes) -> StableOPDConfig:
    return StableOPDConfig(
        **{
            "rollout": {"num_prompts": 4, "num_generations": 2, "max_completion_length": 10},
            "learning_rate": 1e-2,
            "max_steps": 2,
            "output_dir": str(tmp_path / "run"),
            "evaluation": {"every_steps": 1},
            **changes,
        }
    )


def metrics_of(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", [qwen, llama])
def test_chat_messages_in_trl_format_train_a_chat_student(tmp_path, chat_tokenizer, family):
    trainer = StableOPDTrainer(
        model=family(chat_tokenizer, 1),
        teacher_model=family(chat_tokenizer, 2),
        args=arguments(tmp_path),
        train_dataset=Dataset.from_list(chat_rows()),
        eval_dataset=chat_rows()[:4],
        processing_class=chat_tokenizer,
    )
    im_end, end_of_text = chat_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert trainer.engine.end_token_ids == {im_end, end_of_text}
    example = trainer.data.stream.batch(1)[0]
    assert example.gold_ids[-1] == im_end
    assert chat_tokenizer.decode(example.prompt_ids).endswith("<|im_start|>assistant\n")
    state = trainer.train()
    assert state.step == 2
    assert "eval/validation/accuracy" in metrics_of(tmp_path)[-1]


def test_a_student_learns_gold_by_heart_under_stableopd(tmp_path, chat_tokenizer):
    """The whole loop pulls: after some steps the gold term is a fraction of what it was."""
    trainer = StableOPDTrainer(
        model=qwen(chat_tokenizer, 1),
        teacher_model=qwen(chat_tokenizer, 2),
        args=arguments(tmp_path, max_steps=25, beta_kl=0.0, rollout={"num_prompts": 8, "max_completion_length": 10}),
        train_dataset=chat_rows(),
        processing_class=chat_tokenizer,
    )
    trainer.train()
    rows = metrics_of(tmp_path)
    assert rows[-1]["loss/gold"] < 0.3 * rows[0]["loss/gold"]


def broken_teacher(checkpoints):
    """The teacher with one NaN in its weights, as a file that was half written has."""
    teacher = AutoModelForCausalLM.from_pretrained(checkpoints / "teacher")
    with torch.no_grad():
        next(teacher.parameters())[0, 0] = torch.nan
        next(p for name, p in teacher.named_parameters() if name.endswith("norm.weight"))[0] = torch.nan
    return teacher


def test_a_run_that_makes_no_update_says_so_at_once_and_ends(run_settings, checkpoints, tmp_path):
    settings = run_settings(method="opd", max_steps=20, evaluation={"path": None}, checkpoint={"every_steps": 3})
    trainer = StableOPDTrainer(teacher_model=broken_teacher(checkpoints), args=StableOPDConfig(**settings))
    with pytest.raises(TrainingError, match=r"step 10: no update .* last 10 steps.*weights of student or teacher"):
        trainer.train()
    rows = metrics_of(tmp_path)
    assert [row["skipped_updates"] for row in rows] == [1.0] * 10
    said = [json.loads(line) for line in (tmp_path / "run" / "alerts.jsonl").read_text().splitlines()]
    said = [(alert["step"], alert["severity"]) for alert in said if alert["rule"] == "skipped_updates"]
    assert said == [(1, "warning"), (2, "critical")]
    assert judge_run(rows).status == "warning"
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-000006", "step-000009"]
    with pytest.raises(TrainingError, match="last 10 steps"):  # the count goes on where the checkpoint left it
        StableOPDTrainer(teacher_model=broken_teacher(checkpoints), args=StableOPDConfig(**settings)).train(
            resume_from_checkpoint=True
        )
    assert len(metrics_of(tmp_path)) == 10


def test_a_run_none_of_whose_tokens_count_says_which_setting_leaves_them_out(run_settings, tmp_path):
    settings = run_settings(
        method="opd", max_steps=20, evaluation={"path": None}, rollout={"max_completion_length": 1},
        objective={"distill": {"tokens": {"truncated_weight": 0.0}}},
    )  # fmt: skip
    trainer = StableOPDTrainer(args=StableOPDConfig(**settings))
    trainer.engine.end_token_ids = frozenset()
    with pytest.raises(TrainingError, match=r"no token counted in any loss.*truncated_weight"):
        trainer.train()
    assert metrics_of(tmp_path)[-1]["skipped_updates/no_tokens"] == 1.0


def test_text_prompts_from_parquet_files_and_a_gold_pool(tmp_path, checkpoints, dataset):
    rows = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()]
    prompts = [{key: row[key] for key in ("prompt", "answer")} for row in rows]
    pq.write_table(pa.Table.from_pylist(prompts), tmp_path / "prompts.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "gold.parquet")
    trainer = StableOPDTrainer(
        model=str(checkpoints / "student"),
        teacher_model=str(checkpoints / "teacher"),
        args=arguments(
            tmp_path, data={"path": str(tmp_path / "prompts.parquet"), "gold_path": str(tmp_path / "gold.parquet")}
        ),
    )
    trainer.train()
    assert metrics_of(tmp_path)[-1]["loss/gold"] > 0


@pytest.mark.parametrize("given", ["settings", "peft_config"])
def test_lora_trains_adapters_only_and_its_reference_is_the_model_without_them(tmp_path, chat_tokenizer, given):
    lora = {"student": {"lora": {"r": 4}}} if given == "settings" else {}
    peft_config = None if lora else LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    base = qwen(chat_tokenizer, 1)
    base.save_pretrained(tmp_path / "base")
    before = {name: p.clone() for name, p in base.named_parameters()}

    def trainer(steps: int) -> StableOPDTrainer:
        return StableOPDTrainer(
            model=AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            teacher_model=qwen(chat_tokenizer, 2),
            args=arguments(tmp_path, max_steps=steps, checkpoint={"every_steps": 1}, **lora),
            train_dataset=chat_rows(),
            processing_class=chat_tokenizer,
            peft_config=peft_config,
        )

    first = trainer(2)
    first.train()
    trained = [name for name, p in first.student.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    for name, p in first.student.get_base_model().named_parameters():
        plain = name.replace(".base_layer", "")
        assert plain not in before or torch.equal(p, before[plain]), name
    kl = [row["reference/kl"] for row in metrics_of(tmp_path)]
    assert kl[0] < 1e-6 < kl[1]

    resumed = trainer(3)
    resumed.train(resume_from_checkpoint=True)
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2, 3]
    saved = AutoModelForCausalLM.from_pretrained(checkpoints_in(tmp_path / "run" / "checkpoints")[-1])
    ids = torch.tensor([[5, 6, 7, 8]])
    resumed.student.eval()
    torch.testing.assert_close(saved(ids).logits, resumed.student(ids).logits)


def test_gradient_checkpointing_changes_memory_and_not_the_run(tmp_path, chat_tokenizer):
    rows = []
    for on in (False, True):
        (tmp_path / str(on)).mkdir()
        trainer = StableOPDTrainer(
            model=qwen(chat_tokenizer, 1),
            teacher_model=qwen(chat_tokenizer, 2),
            args=arguments(tmp_path / str(on), gradient_checkpointing=on),
            train_dataset=chat_rows(),
            processing_class=chat_tokenizer,
        )
        trainer.train()
        rows.append(metrics_of(tmp_path / str(on))[-1])
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)


def test_bfloat16_arithmetic_keeps_float32_weights_and_trains(tmp_path, chat_tokenizer):
    trainer = StableOPDTrainer(
        model=qwen(chat_tokenizer, 1),
        teacher_model=qwen(chat_tokenizer, 2),
        args=arguments(tmp_path, bf16=True),
        train_dataset=chat_rows(),
        processing_class=chat_tokenizer,
    )
    before = next(trainer.student.parameters()).clone()
    trainer.train()
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
    assert not torch.equal(before, next(trainer.student.parameters()))
    gap = metrics_of(tmp_path)[0]["sampling/logprob_gap"]
    assert 0 < gap < 0.1, "bfloat16 rounds, and the gap shows it"


def test_in_float32_sampling_and_training_agree_on_log_probabilities(tmp_path, chat_tokenizer):
    trainer = StableOPDTrainer(
        model=qwen(chat_tokenizer, 1),
        teacher_model=qwen(chat_tokenizer, 2),
        args=arguments(tmp_path, temperature=0.7, top_p=0.9, top_k=20),
        train_dataset=chat_rows(),
        processing_class=chat_tokenizer,
    )
    trainer.train()
    assert all(row["sampling/logprob_gap"] < 1e-4 for row in metrics_of(tmp_path))


def test_embeddings_padded_to_another_size_are_a_pair_all_the_same(tmp_path, chat_tokenizer):
    trainer = StableOPDTrainer(
        model=qwen(chat_tokenizer, 1, extra_rows=6),
        teacher_model=qwen(chat_tokenizer, 2, extra_rows=70),
        args=arguments(tmp_path),
        train_dataset=chat_rows(),
        processing_class=chat_tokenizer,
    )
    assert trainer.train().step == 2


def test_a_teacher_equal_to_the_student_has_nothing_to_teach(tmp_path, chat_tokenizer):
    trainer = StableOPDTrainer(
        model=qwen(chat_tokenizer, 1),
        teacher_model=qwen(chat_tokenizer, 1),
        args=arguments(tmp_path, method="opd", max_steps=1),
        train_dataset=chat_rows(),
        processing_class=chat_tokenizer,
    )
    trainer.train()
    row = metrics_of(tmp_path)[0]
    assert abs(row["teacher/reverse_kl"]) < 1e-5
    assert row["grad_norm"] < 1e-4


def test_callbacks_hear_of_every_event_in_order(tmp_path, chat_tokenizer):
    heard = []

    class Listener(Callback):
        def on_train_begin(self, trainer):
            heard.append("begin")

        def on_phase(self, trainer, step, phase):
            heard.append(f"{phase} {step}")

        def on_step_end(self, trainer, metrics, alerts):
            heard.append(f"step {metrics['step']}")

        def on_evaluate(self, trainer, metrics):
            heard.append("evaluate")

        def on_save(self, trainer, path):
            heard.append("save")

        def on_train_end(self, trainer):
            heard.append("end")

    StableOPDTrainer(
        model=qwen(chat_tokenizer, 1),
        teacher_model=qwen(chat_tokenizer, 2),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=chat_rows(),
        eval_dataset=chat_rows()[:2],
        processing_class=chat_tokenizer,
        callbacks=[Listener()],
    ).train()
    assert heard == [
        "begin", "evaluation 0", "evaluate", "step 0",
        "rollout 1", "teacher 1", "health 1", "update 1", "evaluation 1", "evaluate", "step 1", "save", "end",
    ]  # fmt: skip


def test_tensorboard_gets_the_metrics(tmp_path, chat_tokenizer):
    StableOPDTrainer(
        model=qwen(chat_tokenizer, 1),
        teacher_model=qwen(chat_tokenizer, 2),
        args=arguments(tmp_path, max_steps=1, report_to="tensorboard"),
        train_dataset=chat_rows(),
        processing_class=chat_tokenizer,
    ).train()
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_an_unknown_tracker_is_refused(tmp_path, chat_tokenizer):
    with pytest.raises(ConfigError, match="report_to"):
        StableOPDTrainer(
            model=qwen(chat_tokenizer, 1), teacher_model=qwen(chat_tokenizer, 2),
            args=arguments(tmp_path, report_to="carrier-pigeon"), train_dataset=chat_rows(),
            processing_class=chat_tokenizer,
        )  # fmt: skip


def test_gold_that_does_not_fit_the_context_is_refused(tmp_path, chat_tokenizer):
    rows = chat_rows()
    rows[3]["completion"][0]["content"] = "It is " * 200
    with pytest.raises(DataError, match="row 4: prompt and gold have"):
        StableOPDTrainer(
            model=qwen(chat_tokenizer, 1), teacher_model=qwen(chat_tokenizer, 2), args=arguments(tmp_path),
            train_dataset=rows, processing_class=chat_tokenizer,
        )  # fmt: skip


def test_a_teacher_with_fewer_embeddings_than_the_tokenizer_has_ids_is_refused(tmp_path, chat_tokenizer):
    with pytest.raises(ModelError, match="the teacher has"):
        StableOPDTrainer(
            model=qwen(chat_tokenizer, 1), teacher_model=qwen(chat_tokenizer, 2, extra_rows=-5),
            args=arguments(tmp_path), train_dataset=chat_rows(), processing_class=chat_tokenizer,
        )  # fmt: skip


def short_sighted(tokenizer, seed: int, positions: int) -> Qwen3ForCausalLM:
    model = qwen(tokenizer, seed)
    model.config.max_position_embeddings = positions
    return model


def test_gold_may_be_longer_than_what_the_teacher_reads(tmp_path, chat_tokenizer):
    """The teacher scores rollouts only."""
    rows = chat_rows()
    for row in rows:
        row["completion"][0]["content"] = "It is " * 20
    trainer = StableOPDTrainer(
        model=qwen(chat_tokenizer, 1), teacher_model=short_sighted(chat_tokenizer, 2, 60),
        args=arguments(tmp_path, max_steps=1), train_dataset=rows, processing_class=chat_tokenizer,
    )  # fmt: skip
    assert len(trainer.data.stream.batch(1)[0].gold_ids) > 60
    assert trainer.train().step == 1


def test_an_adapter_folder_can_be_the_teacher(tmp_path, chat_tokenizer):
    qwen(chat_tokenizer, 2).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(str(tmp_path / "base"))
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(str(tmp_path / "adapter"))
    chat_tokenizer.save_pretrained(str(tmp_path / "adapter"))
    trainer = StableOPDTrainer(
        model=qwen(chat_tokenizer, 1), teacher_model=str(tmp_path / "adapter"), args=arguments(tmp_path, max_steps=1),
        train_dataset=chat_rows(), processing_class=chat_tokenizer,
    )  # fmt: skip
    assert trainer.train().step == 1


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["all weights", "adapters again"])
def test_a_student_in_an_adapter_folder_is_refused_as_its_checkpoints_would_lose_them(tmp_path, chat_tokenizer, lora):
    qwen(chat_tokenizer, 1).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(str(tmp_path / "cold"))
    chat_tokenizer.save_pretrained(str(tmp_path / "cold"))
    given = {"student": {"lora": lora}} if lora else {}
    with pytest.raises(ConfigError, match=r"folder of adapters.*student.lora.merge=true"):
        StableOPDTrainer(
            model=str(tmp_path / "cold"), teacher_model=qwen(chat_tokenizer, 2),
            args=arguments(tmp_path, max_steps=1, **given),
            train_dataset=chat_rows(), processing_class=chat_tokenizer,
        )  # fmt: skip


def test_adapters_over_a_bfloat16_base_are_trained_in_float32(tmp_path, chat_tokenizer):
    trainer = StableOPDTrainer(
        model=qwen(chat_tokenizer, 1).bfloat16(), teacher_model=qwen(chat_tokenizer, 2),
        args=arguments(tmp_path, max_steps=1, bf16=True), train_dataset=chat_rows(), processing_class=chat_tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    assert {p.dtype for p in trainer.student.parameters() if p.requires_grad} == {torch.float32}
    assert trainer.train().step == 1


def test_benchmarks_are_answered_beside_the_held_out_prompts_with_the_figures_of_many_answers(
    run_settings, dataset, tmp_path
):
    copy = tmp_path / "more.jsonl"
    copy.write_text("".join((dataset / "validation.jsonl").read_text().splitlines(keepends=True)[:6]))
    evaluation = {"num_samples": 3, "benchmarks": [str(copy)]}
    trainer = StableOPDTrainer(args=StableOPDConfig(**run_settings(evaluation=evaluation, max_steps=1)))
    metrics = trainer.evaluate()
    for name in ("validation", "more"):
        assert metrics[f"eval/{name}/accuracy"] == metrics[f"eval/{name}/avg_at_k"]
        assert metrics[f"eval/{name}/accuracy"] <= metrics[f"eval/{name}/pass_at_k"]
        assert metrics[f"eval/{name}/accuracy_low"] <= metrics[f"eval/{name}/accuracy_high"]
        assert f"eval/{name}_greedy/accuracy" in metrics
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval/more/accuracy"] == metrics["eval/more/accuracy"]


@pytest.mark.parametrize("chat", [True, False])
def test_questions_of_benchmarks_go_through_the_chat_template_unless_the_run_is_of_plain_text(
    chat, chat_tokenizer, tmp_path
):
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "2+2", "answer": "4"}))
    evaluation = {"benchmarks": [str(tmp_path / "more.jsonl")], "chat": chat}
    trainer = StableOPDTrainer(
        model=qwen(chat_tokenizer, 1),
        teacher_model=qwen(chat_tokenizer, 2),
        args=arguments(tmp_path, evaluation=evaluation),
        train_dataset=[{"prompt": "1+1", "gold": "2"}] * 4,
        processing_class=chat_tokenizer,
    )
    [example] = trainer.data.benchmarks["more"]
    asked = chat_tokenizer.decode(example.prompt_ids)
    assert asked.startswith("<|im_start|>") == chat
    assert (asked == "2+2") == (not chat)


def test_two_sets_of_one_name_and_benchmarks_that_are_not_there_are_refused(run_settings, dataset, tmp_path):
    for benchmarks, words in (
        ([str(dataset / "validation.jsonl")], "like another set"),
        (["math50"], "did you mean 'math500'"),
        ([str(tmp_path / "absent.jsonl")], "does not exist"),
    ):
        with pytest.raises((ConfigError, DataError), match=words):
            StableOPDTrainer(args=StableOPDConfig(**run_settings(evaluation={"benchmarks": benchmarks})))


@pytest.mark.parametrize("name", ["validation", "validation_greedy"])
def test_a_benchmark_may_not_take_the_name_of_held_out_rows_or_of_their_greedy_answers(run_settings, tmp_path, name):
    rows = [{"prompt": "12:", "answer": "0"}]
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(rows[0]))
    config = StableOPDConfig(**run_settings(evaluation={"path": None, "benchmarks": [str(path)]}))
    with pytest.raises(ConfigError, match="like another set"):
        StableOPDTrainer(args=config, eval_dataset=rows)
