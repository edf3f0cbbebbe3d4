"""Backbone and head of real models, tiny and random: the model's own logits, its gradients, and who falls back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from stableopd.fused import Projected, SampledTerm, fused_loss
from stableopd.heads import HeadlessModel, IdentityHead, LinearHead
from stableopd.losses import token_logprobs
from stableopd.models import AdaptersOff, computing_module

VOCAB, PADDING, WINDOW = 40, 3, 12
LENGTHS = (30, 5, 17, 30)
"""Of packed sequences: longer than the window and than the probe, and two of one length side by side."""

SHAPE = {
    "vocab_size": VOCAB + PADDING, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.4, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "tie_word_embeddings": True,
}  # fmt: skip
LOCAL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


@dataclass(frozen=True)
class Family:
    config: Any
    options: dict[str, Any]
    head: dict[str, Any]
    packs: bool = True


FAMILIES = {
    "qwen3": Family(hf.Qwen3Config, {"head_dim": 8}, {}),
    "qwen3 tied": Family(hf.Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}, {}),
    "llama": Family(hf.LlamaConfig, {}, {}),
    "mistral": Family(hf.MistralConfig, {"head_dim": 8, "sliding_window": WINDOW}, {}),
    "gemma2": Family(
        hf.Gemma2Config,
        {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, **LOCAL},
        {"softcap": 3.0},
        packs=False,
    ),
    "gemma3": Family(hf.Gemma3TextConfig, {"head_dim": 8, "final_logit_softcapping": 3.0, **LOCAL}, {"softcap": 3.0}),
    "recurrent gemma": Family(
        hf.RecurrentGemmaConfig,
        {
            "block_types": ["recurrent", "attention"], "attention_window_size": WINDOW, "lru_width": 16,
            "logits_soft_cap": 3.0, "w_init_variance_scale": 1.0,
        },
        {"softcap": 3.0},
        packs=False,
    ),
    "cohere": Family(hf.CohereConfig, {"logit_scale": 0.3}, {"scale": 0.3}),
    "granite": Family(hf.GraniteConfig, {"logits_scaling": 4.0}, {"scale": 0.25}),
    "gpt2 tied": Family(hf.GPT2Config, GPT2, {}),
    "phi": Family(hf.PhiConfig, {}, {"bias": True}),
    "qwen3 moe": Family(hf.Qwen3MoeConfig, {"head_dim": 8, **EXPERTS}, {}),
    "mixtral": Family(hf.MixtralConfig, {"num_local_experts": 4, "sliding_window": WINDOW}, {}),
}  # fmt: skip

ALONE = {
    "convolutions, too weak to be noticed by trying": Family(
        hf.Lfm2Config,
        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "initializer_range": 0.02},
        {},
    ),
    "a window in the mask alone": Family(
        hf.Qwen2MoeConfig,
        {
            **EXPERTS, "shared_expert_intermediate_size": 8, "sliding_window": WINDOW, "use_sliding_window": True,
            "max_window_layers": 1,
        },
        {},
    ),
    "chunks in the mask alone": Family(
        hf.Llama4TextConfig,
        {
            "head_dim": 8, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 24, "num_local_experts": 2,
            "no_rope_layers": [1, 0],
        },
        {},
    ),
    "positions by the mask": Family(hf.FalconConfig, {"alibi": True}, {}),
}  # fmt: skip
"""Models whose sequences would get into each other, or see too far, if they were packed."""


def build(config: Any, options: dict[str, Any], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return hf.AutoModelForCausalLM.from_config(config(**{**SHAPE, **options})).eval()


def of_family(name: str) -> nn.Module:
    family = FAMILIES[name]
    model = build(family.config, family.options)
    if family.head.get("bias"):
        with torch.no_grad():
            model.get_output_embeddings().bias.normal_()
    return model


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def own_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids, use_cache=False).logits[..., :VOCAB]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5, message: str = "") -> None:
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale, msg=message or None)


@pytest.mark.parametrize("name", FAMILIES)
def test_backbone_and_head_give_the_models_own_logits_cut_to_the_vocabulary(name):
    model, wanted = of_family(name), FAMILIES[name].head
    headless = HeadlessModel(model, VOCAB)
    head = headless.head
    assert isinstance(head, LinearHead)
    assert (head.scale, head.softcap) == (wanted.get("scale", 1.0), wanted.get("softcap"))
    assert (head.bias is not None) == wanted.get("bias", False)
    with torch.no_grad():
        expected = own_logits(model, ids(2, 30))
        assert expected.abs().max() > 1, "logits so small that no soft cap would be noticed"
        assert_close(head.logits(headless(ids(2, 30))), expected)
    assert expected.shape[-1] == VOCAB < head.weight.shape[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_training_through_the_head_gives_the_models_own_gradients(name):
    """By plain operations on the head's logits, and in the fused pass."""
    model, read, target = of_family(name), ids(2, 9), ids(18, seed=2)
    headless = HeadlessModel(model, VOCAB)
    model.train()
    names, parameters = zip(*model.named_parameters(), strict=True)
    weight = torch.linspace(0.5, 1.5, 18)

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found, strict=True)]

    expected = gradients(-(token_logprobs(own_logits(model, read).flatten(0, 1), target) * weight).sum())
    states = headless(read).flatten(0, 1)
    plain = gradients(-(token_logprobs(headless.head.logits(states), target) * weight).sum())
    term = SampledTerm(name="gold", weight=weight, loss=lambda logprobs, at, _: -logprobs)
    states = headless(read).flatten(0, 1)
    fused = gradients(fused_loss(Projected(states=states, head=headless.head), target, [term], chunk_rows=7).loss)
    assert sum(bool(grad.abs().max() > 0) for grad in expected) > 5
    for at, grad in enumerate(expected):
        assert_close(plain[at], grad, 1e-4, names[at])
        assert_close(fused[at], grad, 1e-4, names[at])


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_sequences_get_the_logits_that_each_gets_by_itself(name):
    model = of_family(name)
    headless = HeadlessModel(model, VOCAB)
    assert headless.packs == FAMILIES[name].packs
    if headless.packs:
        packed = ids(1, sum(LENGTHS))
        with torch.no_grad():
            expected = torch.cat([own_logits(model, part) for part in packed.split(LENGTHS, dim=1)], dim=1)
            assert_close(headless.head.logits(headless(packed, LENGTHS)), expected)


@pytest.mark.parametrize("reason", ALONE)
def test_models_in_which_packed_sequences_would_not_stay_apart_are_not_packed(reason):
    model = build(ALONE[reason].config, ALONE[reason].options)
    before = model.config._attn_implementation
    headless = HeadlessModel(model, VOCAB)
    assert not headless.packs
    assert model.config._attn_implementation == before == "sdpa"
    with torch.no_grad():
        assert_close(headless.head.logits(headless(ids(2, 30))), own_logits(model, ids(2, 30)))


class Biased(hf.Qwen3ForCausalLM):
    """Adds to its logits what no head knows of."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits + torch.linspace(-2, 2, output.logits.shape[-1])
        return output


class OtherHead(nn.Linear):
    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states).sin()


def biased() -> nn.Module:
    torch.manual_seed(0)
    return Biased(hf.Qwen3Config(**{**SHAPE, "head_dim": 8})).eval()


def with_another_head() -> nn.Module:
    model = of_family("qwen3")
    model.lm_head = OtherHead(16, VOCAB + PADDING, bias=False)
    return model


def with_a_scale_that_it_ignores() -> nn.Module:
    model = of_family("llama")
    model.config.logit_scale = 0.5
    return model


def with_adapters_on_its_head(**options: Any) -> nn.Module:
    adapted = get_peft_model(of_family("qwen3"), LoraConfig(task_type="CAUSAL_LM", r=2, **options))
    spread_out(adapted)
    return computing_module(adapted).eval()


def spread_out(adapted: nn.Module) -> None:
    """Adapters as after some training: none of them is 0."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)


FALLBACKS = {
    "logits are added to": biased,
    "a head of another class": with_another_head,
    "a scale in the configuration that the model ignores": with_a_scale_that_it_ignores,
    "adapters on the head": lambda: with_adapters_on_its_head(target_modules=["lm_head", "q_proj"]),
    "a trained copy of the head": lambda: with_adapters_on_its_head(
        target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_a_model_whose_head_is_no_plain_linear_map_is_asked_for_its_logits(reason):
    model = FALLBACKS[reason]()
    headless = HeadlessModel(model, VOCAB)
    assert isinstance(headless.head, IdentityHead)
    read, target = ids(2, 9), ids(18, seed=2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    term = SampledTerm(name="gold", weight=torch.ones(18), loss=lambda logprobs, at, _: -logprobs)
    projected = Projected(states=headless(read).flatten(0, 1), head=headless.head)
    found = fused_loss(projected, target, [term])
    expected = token_logprobs(own_logits(model, read).flatten(0, 1), target)
    assert_close(found.logprobs, expected.detach())
    grads = torch.autograd.grad(found.loss, trained, allow_unused=True)
    for grad, other in zip(grads, torch.autograd.grad(-expected.sum(), trained, allow_unused=True), strict=True):
        assert (grad is None) == (other is None)
        if other is not None:
            assert_close(grad, other, 1e-4)
    if headless.packs:
        packed = ids(1, sum(LENGTHS))
        alone = torch.cat([own_logits(model, part) for part in packed.split(LENGTHS, dim=1)], dim=1)
        assert_close(headless.head.logits(headless(packed, LENGTHS)), alone)


def test_adapters_elsewhere_leave_the_head_linear_and_can_be_switched_off():
    base = of_family("qwen3")
    with torch.no_grad():
        before = own_logits(base, ids(2, 9))
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    spread_out(adapted)
    headless = HeadlessModel(computing_module(adapted), VOCAB)
    off = AdaptersOff(adapted, headless)
    assert isinstance(headless.head, LinearHead)
    with torch.no_grad():
        assert_close(off.head.logits(off(ids(2, 9))), before)
        now = headless.head.logits(headless(ids(2, 9)))
        assert_close(now, own_logits(adapted.eval(), ids(2, 9)))
    assert (now - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("name", ["qwen3", "gpt2 tied", "gemma2"])
def test_looking_at_a_model_leaves_its_modes_its_weights_and_the_random_numbers_alone(name):
    model = of_family(name).train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    weights = [parameter.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    headless = HeadlessModel(model, VOCAB)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), weights, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {id(p) for p in headless.parameters()} == {id(p) for p in model.parameters()}


def test_the_head_is_that_of_the_model_as_it_is_now():
    """Casting a model replaces its weights; a head that was kept would be the old one."""
    model = of_family("qwen3")
    headless = HeadlessModel(model, VOCAB)
    model.double()
    assert headless.head.weight.dtype == torch.float64
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)
    with torch.no_grad():
        assert_close(headless.head.logits(headless(ids(1, 9))), own_logits(model, ids(1, 9)), 1e-12)
