"""The estimate of memory and time against what real models hold and take."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from stableopd.config import StableOPDConfig
from stableopd.doctor.estimate import estimate, estimate_findings
from stableopd.doctor.hardware import DEVICES, GIB, Hardware
from stableopd.doctor.memory import quantised_bits
from stableopd.doctor.shapes import ModelShape
from stableopd.errors import ConfigError, ModelError
from stableopd.heads import HeadlessModel
from stableopd.optimizer import adamw
from stableopd.rollout.cache import growing_cache
from stableopd.rows import gold_rows
from stableopd.step import Updater
from stableopd.types import Example

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
STUDENT_1_5B = Qwen2Config(
    hidden_size=1536,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    intermediate_size=8960,
    vocab_size=151936,
    tie_word_embeddings=True,
)
TEACHER_7B = Qwen2Config(
    hidden_size=3584,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    intermediate_size=18944,
    vocab_size=152064,
    tie_word_embeddings=False,
)
QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
STUDENT_0_6B = Qwen3Config(
    hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, **QWEN3
)
TEACHER_4B = Qwen3Config(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, **QWEN3
)


def tiny(*, layers: int = 3, hidden: int = 64, vocab: int = 300, tied: bool = False) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        max_position_embeddings=1024,
    )


def settings(**sections) -> StableOPDConfig:
    return StableOPDConfig(method="stableopd", **sections)


def recipe(name: str) -> StableOPDConfig:
    return StableOPDConfig(**yaml.safe_load((RECIPES / name).read_text()))


def updater(model, config: StableOPDConfig) -> Updater:
    return Updater(
        HeadlessModel(model, model.config.vocab_size),
        adamw(model, config.optimizer),
        config.objective,
        Accelerator(cpu=True),
        temperature=1.0,
        max_grad_norm=1.0,
        token_budget=config.optimizer.micro_batch_tokens,
    )


def gold(rows: int, prompt: int, completion: int, vocab: int):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocab, (rows, prompt + completion), generator=draw).tolist()
    examples = [
        Example(index=i, prompt="", prompt_ids=tuple(row[:prompt]), gold_ids=tuple(row[prompt:]))
        for i, row in enumerate(ids)
    ]
    return gold_rows(examples, range(rows), 0, torch.device("cpu"))


# ------------------------------------------------------------------------------------ memory, measured


@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(tied):
    shape, config = tiny(tied=tied), StableOPDConfig(method="sft", rollout={"num_prompts": 4})
    model = AutoModelForCausalLM.from_config(shape).float()
    optimizer = updater(model, config).optimizer
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()

    memory = estimate(config, shape, None, "24GiB").memory

    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    states = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert memory.optimizer == states


def test_adapters_are_counted_as_peft_makes_them():
    pytest.importorskip("peft")
    from stableopd.models import lora_config, with_adapters

    config = settings(student={"lora": {"r": 4}})
    model = with_adapters(AutoModelForCausalLM.from_config(tiny()).float(), lora_config(config.student.lora), seed=0)
    memory = estimate(config, tiny(), tiny(), "24GiB").memory
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert memory.reference == 0


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_within_a_factor_of_two_of_what_a_real_backward_pass_keeps(bf16, checkpoints):
    rows, prompt, completion = 4, 32, 96
    config = StableOPDConfig(
        method="sft",
        data={"max_prompt_length": prompt},
        rollout={"num_prompts": rows, "max_completion_length": completion},
        optimizer={
            "micro_batch_tokens": rows * (prompt + completion),
            "bf16": bf16,
            "gradient_checkpointing": checkpoints,
        },
    )
    shape = tiny(layers=4)
    model = AutoModelForCausalLM.from_config(shape).float().train()
    if checkpoints:
        model.gradient_checkpointing_enable()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    headless = HeadlessModel(model, shape.vocab_size)
    headless.train()
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(array):
        storage = array.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return array

    ids = torch.randint(1, shape.vocab_size, (1, rows * (prompt + completion)))
    lengths = [prompt + completion] * rows
    with saved_tensors_hooks(keep, lambda array: array), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        states = headless(ids, lengths)
    kept = sum(storage.nbytes() for storage in saved.values())
    assert states.requires_grad

    memory = estimate(config, shape, None, "24GiB").memory
    narrow = 2 * ModelShape(shape).num_linear if bf16 and not checkpoints else 0
    layer = ModelShape(shape).layer_bytes(prompt + completion, bf16=bf16, weight_bytes=4, eager=False)
    recomputed = layer * ids.numel() if checkpoints else 0  # comes later, in the backward pass
    expected = memory.activations + narrow - recomputed
    print(f"bf16={bf16} checkpoints={checkpoints}: kept {kept:,}, estimated {expected:,.0f}")
    assert kept / 2 < expected < kept * 2


@pytest.mark.parametrize(("completion", "bf16"), [(1, False), (64, False), (65, False), (200, False), (200, True)])
def test_the_key_value_cache_is_as_large_as_the_real_one(completion, bf16):
    rows, prompt, shape = 3, 20, tiny()
    model = AutoModelForCausalLM.from_config(shape).float().eval()
    cache = growing_cache(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for width in (prompt, *[1] * (completion - 1)):
            model(input_ids=torch.ones(rows, width, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(buffer.nbytes for layer in cache.layers for buffer in layer._buffers)

    config = settings(
        data={"max_prompt_length": prompt},
        rollout={"num_prompts": rows, "num_generations": 1, "max_completion_length": completion},
        optimizer={"bf16": bf16},
    )
    assert estimate(config, shape, shape, "24GiB").memory.cache == held


# ------------------------------------------------------------------------------------ public shapes


@pytest.mark.parametrize(
    ("shape", "parameters"), [(STUDENT_1_5B, 1_543_714_304), (TEACHER_7B, 7_615_616_512)], ids=["1.5B", "7B"]
)
def test_parameters_of_public_shapes(shape, parameters):
    assert ModelShape(shape).num_parameters == parameters


ON_1_5B = ("qwen2.5-math-1.5b-openthinker3-7b.yaml", "qwen2.5-math-1.5b-r1-distill-7b.yaml", "baselines/opd.yaml")


def shapes_of(config: StableOPDConfig):
    """Configurations of the models that a recipe names."""
    sizes = {"0.6B": STUDENT_0_6B, "1.5B": STUDENT_1_5B, "4B": TEACHER_4B, "7B": TEACHER_7B}
    names = [config.student.model_name_or_path, config.teacher.model_name_or_path]
    return [next((shape for size, shape in sizes.items() if size in (name or "")), None) for name in names]


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_fits_the_hardware_of_the_paper(path):
    config = StableOPDConfig(**yaml.safe_load(path.read_text()))
    found = estimate(config, *shapes_of(config), "h200x4")
    assert estimate_findings(found) == []
    assert found.seconds.total > 0


def test_whole_weights_of_7b_do_not_fit_it_which_is_why_that_recipe_trains_adapters():
    config = recipe("qwen2.5-math-7b-openthinker3-7b.yaml")
    whole = config.model_copy(update={"student": config.student.model_copy(update={"lora": None})})
    assert [finding.danger for finding in estimate_findings(estimate(whole, *shapes_of(whole), "h200x4"))] == ["fatal"]


@pytest.mark.parametrize("name", ON_1_5B)
def test_full_fine_tuning_recipes_fit_four_large_devices_and_not_a_small_one(name):
    config = recipe(name)
    large = estimate(config, STUDENT_1_5B, TEACHER_7B, "h100x4")
    assert estimate_findings(large) == []
    assert large.memory.weights == 1_543_714_304 * 4
    assert large.memory.teacher == 7_615_616_512 * 2
    small = estimate(config, STUDENT_1_5B, TEACHER_7B, "rtx4090")
    (finding,) = estimate_findings(small)
    assert (finding.check, finding.danger) == ("memory", "fatal")
    assert "rollout.max_batch_size" in finding.remedy
    assert small.seconds.total > large.seconds.total > 0


def test_the_adapter_recipe_fits_one_large_device_and_a_small_one_with_smaller_batches():
    pytest.importorskip("peft")
    config = recipe("lora-one-gpu.yaml")
    assert estimate_findings(estimate(config, STUDENT_0_6B, TEACHER_4B, "h100")) == []
    (finding,) = estimate_findings(estimate(config, STUDENT_0_6B, TEACHER_4B, "rtx4090"))
    assert finding.remedy.startswith("lower rollout.max_batch_size")
    smaller = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_batch_size": 32})})
    assert estimate_findings(estimate(smaller, STUDENT_0_6B, TEACHER_4B, "rtx4090")) == []


# ------------------------------------------------------------------------------------ settings


def test_settings_that_save_memory_do_so():
    base = {"optimizer": {"micro_batch_tokens": 16_384, "bf16": True}, "rollout": {"num_prompts": 64}}

    def memory(**more):
        merged = {name: {**base.get(name, {}), **more.get(name, {})} for name in {*base, *more}}
        return estimate(settings(**merged), STUDENT_1_5B, TEACHER_7B, "h100x4").memory

    plain = memory()
    assert memory(optimizer={"gradient_checkpointing": True}).activations < plain.activations / 4
    assert memory(optimizer={"micro_batch_tokens": 4_096}).activations < plain.activations / 3
    assert memory(rollout={"max_batch_size": 16}).cache == plain.cache / 4
    away = memory(teacher={"offload": True})
    assert away.by_phase["rollout"] == plain.by_phase["rollout"] - plain.teacher
    assert away.by_phase["teacher"] == plain.by_phase["teacher"]
    assert memory(teacher={"server_url": "http://10.0.0.5:8000"}).teacher == 0
    assert memory(teacher={"dtype": "bfloat16"}).teacher == plain.teacher / 2
    four = memory(teacher={"quantization": {"load_in_4bit": True}})
    assert four.teacher < plain.teacher / 4
    ahead = memory(rollout={"pipeline": True}, objective={"correction": {"kind": "truncate"}})
    assert ahead.by_phase["update"] > plain.by_phase["update"] + plain.weights
    assert plain.reference == plain.weights


def test_a_vllm_engine_in_the_process_takes_its_share_and_a_server_takes_none():
    vllm = {"engine": "vllm", "vllm": {"gpu_memory_utilization": 0.25}}
    inside = estimate(settings(rollout=vllm), STUDENT_1_5B, TEACHER_7B, "h100").memory
    assert (inside.engine, inside.cache) == (20 * GIB, 0)
    server = {"engine": "vllm", "vllm": {"mode": "server", "server_url": "http://10.0.0.5:8000"}}
    assert estimate(settings(rollout=server), STUDENT_1_5B, TEACHER_7B, "h100").memory.engine == 0


def test_a_run_that_nearly_fills_a_device_is_a_problem():
    config = recipe("baselines/opd.yaml")
    needed = estimate(config, STUDENT_1_5B, TEACHER_7B, "h100x4").memory.total
    almost = Hardware(name="made up", num_devices=4, memory_bytes=int(needed / 0.95) + GIB)
    found = estimate(config, STUDENT_1_5B, TEACHER_7B, almost)
    (finding,) = estimate_findings(found)
    assert finding.danger == "problem"
    assert found.seconds is None
    assert "not known" in found.step


@pytest.mark.parametrize(
    ("given", "bits"),
    [
        ({"load_in_4bit": True}, 4.5),
        ({"load_in_8bit": True}, 8),
        ({"bits": 3}, 3.5),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "unheard of"}, 16),
    ],
)
def test_bits_of_quantised_weights(given, bits):
    assert quantised_bits(given) == bits


def test_a_configuration_of_no_language_model_is_refused():
    from transformers import ViTConfig

    with pytest.raises(ModelError, match="the student"):
        estimate(settings(), ViTConfig(), None, "24GiB")


# ------------------------------------------------------------------------------------ hardware


@pytest.mark.parametrize(
    ("text", "count", "gib"),
    [
        ("h100x4", 4, 80),
        ("a100-80gb", 1, 80),
        ("rtx4090x2", 2, 24),
        ("RTX 4090", 1, 24),
        ("24GiB", 1, 24),
        ("A100x8", 8, 80),
        ("a100-40gbx2", 2, 40),
        ("16gibx2", 2, 16),
    ],
)
def test_hardware_by_name(text, count, gib):
    found = Hardware.parse(text)
    assert (found.num_devices, found.memory_bytes) == (count, gib * GIB)


@pytest.mark.parametrize("name", DEVICES)
def test_every_known_device_can_be_counted(name):
    assert Hardware.parse(f"{name}x3").num_devices == 3
    assert Hardware.parse(name).flops_bf16 > Hardware.parse(name).flops_float32


@pytest.mark.parametrize(("text", "meant"), [("h10", "h100"), ("rtx4900", "rtx4090"), ("a100-80", "a100-80gb")])
def test_hardware_that_is_not_known_is_refused_with_the_nearest_name(text, meant):
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'.*Known are .*h200"):
        Hardware.parse(text)


@pytest.mark.parametrize("text", ["", "x4", "h100x0", "0GiB", "-1gib", "h100x-2"])
def test_nonsense_is_no_hardware(text):
    with pytest.raises(ConfigError, match="Known are"):
        Hardware.parse(text)


def test_this_cpu_is_measured():
    found = Hardware.parse("cpu")
    assert found.is_cpu
    assert found.num_devices == 1
    assert found.memory_bytes > GIB
    assert found.flops_float32 > 1e8
    assert found.bandwidth > 1e8


# ------------------------------------------------------------------------------------ time


@pytest.mark.slow
def test_a_step_of_a_small_pair_on_this_cpu_takes_about_the_estimated_time():
    from stableopd.rollout.hf import HFEngine
    from stableopd.teachers.local import LocalTeacher
    from stableopd.types import Sampling

    rows, prompt, completion, vocab = 8, 16, 64, 2_000
    shape = tiny(layers=4, hidden=256, vocab=vocab)
    config = StableOPDConfig(
        method="opd",
        data={"max_prompt_length": prompt},
        rollout={"num_prompts": rows, "num_generations": 1, "max_completion_length": completion},
        optimizer={"micro_batch_tokens": 4_096},
    )
    model = AutoModelForCausalLM.from_config(shape).float()
    work = updater(model, StableOPDConfig(method="sft"))
    batch = gold(rows, prompt, completion, vocab)
    larger = tiny(layers=6, hidden=384, vocab=vocab)
    teacher = LocalTeacher(
        AutoModelForCausalLM.from_config(larger).float(),
        model_id="teacher",
        vocab_size=vocab,
        token_budget=4_096,
        autocast=nullcontext,
    )
    engine = HFEngine(model=model, end_token_ids=(), pad_token_id=0)
    examples = [Example(index=i, prompt="", prompt_ids=tuple(range(1, prompt + 1))) for i in range(rows)]
    sampling = Sampling(num_generations=1, max_new_tokens=completion, temperature=1.0, top_p=1.0, top_k=0, seed=0)

    def timed(job):
        job()
        start = time.perf_counter()
        job()
        return time.perf_counter() - start

    update = timed(lambda: work.update(batch, 1e-5))
    rollout = timed(lambda: engine.generate(examples, sampling, step=1))
    rollouts = engine.generate(examples, sampling, step=1)
    scoring = timed(lambda: teacher.score(rollouts, temperature=1.0))
    found = estimate(config, shape, larger, "cpu", mean_completion=completion).seconds
    print(
        f"update {update:.3f} s, estimated {found.update:.3f}; rollout {rollout:.3f} s, estimated {found.rollout:.3f}"
    )
    print(f"teacher {scoring:.3f} s, estimated {found.teacher:.3f}")
    taken = update + rollout + scoring
    assert taken / 4 < found.total < taken * 4
