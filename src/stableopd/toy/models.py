"""The toy models: ordinary Qwen3 checkpoints, a few thousand parameters large."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

_EMBEDDING_STD = 0.5
_RESIDUAL_OUTPUTS = ("o_proj", "down_proj")


def build_teacher(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Qwen3ForCausalLM:
    """An untrained teacher: 4 layers of width 64, 4 heads, 167k parameters."""
    return build_model(num_layers=4, hidden_size=64, num_heads=4, tokenizer=tokenizer, seed=seed)


def build_student(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Qwen3ForCausalLM:
    """An untrained student: 2 layers of width 24, 2 heads, 12.5k parameters."""
    return build_model(num_layers=2, hidden_size=24, num_heads=2, tokenizer=tokenizer, seed=seed)


def build_model(
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    max_positions: int = 256,
    attention: str = "eager",
) -> Qwen3ForCausalLM:
    """A float32 Qwen3 model from scratch, in evaluation mode; its weights depend on `seed` alone.

    SwiGLU of twice the width, rotary base 1000, untied head, as many key-value heads as heads.
    PyTorch's global random state is left as it was.

    Raises: ValueError if `hidden_size` does not split into heads of an even width, as rotary
    embeddings need it.
    """
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"hidden_size {hidden_size} does not split into {num_heads} heads of an even width. "
            f"Take a multiple of {2 * num_heads}."
        )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        model = Qwen3ForCausalLM(config).float()
    model.set_attn_implementation(attention)  # eager: at the toy's sizes some 8% faster than sdpa
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    _initialise(model, seed)
    return model.eval()


@torch.no_grad()
def _initialise(model: Qwen3ForCausalLM, seed: int) -> None:
    """Embedding N(0, .5²); linear maps N(0, 1/fan_in), divided by √(2 · layers) where they enter the residual."""
    generator = torch.Generator().manual_seed(seed)
    residual_scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, _EMBEDDING_STD, generator=generator)
        elif isinstance(module, nn.Linear):
            scale = residual_scale if name.endswith(_RESIDUAL_OUTPUTS) else 1.0
            module.weight.normal_(0.0, scale / math.sqrt(module.in_features), generator=generator)
