"""Small real pairs for the doctor: checkpoints and tokenizers trained on the spot, healthy until a test breaks them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CORPUS = (
    "The sum of the first n numbers is n(n+1)/2, so the answer is 5050.",
    "What is seven times eight? It is fifty-six, for seven eights are fifty-six.",
    "Let x = 3. Then x^2 + 2x + 1 = 16, hence the result is \\boxed{16}.",
    "def add(a, b):\n    return a + b\n",
    "probe-question probe-answer probe-system user assistant system",
)
OTHER_CORPUS = (
    "Seven ships sailed south; nine nights later none had returned to the narrow northern harbour.",
    "colourless green ideas sleep furiously, as the linguist wrote while waiting for the weather",
    "0123456789 9876543210 1123581321 3141592653",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nReason step by step.<|im_end|>\n{% endif %}" + CHATML
)
NOT_THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n" + NOT_THINKING + "{% endif %}")
HEADERS = (
    "{% for m in messages %}[{{ m.role | upper }}] {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT] {% endif %}"
)
NO_GENERATION_PROMPT = CHATML.split("{% if add_generation_prompt %}")[0]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")


@cache
def _trained(vocab_size: int, corpus: Sequence[str]) -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend.to_str()


def bpe(
    *,
    eos: str | None = "<|im_end|>",
    template: str | None = CHATML,
    bos: bool = False,
    vocab_size: int = 320,
    corpus: Sequence[str] = CORPUS,
    change: Callable[[dict[str, Any]], None] | None = None,
    pad: str | None = "<|endoftext|>",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the turn markers of ChatML; `change` edits its tokenizer.json."""
    described = json.loads(_trained(vocab_size, corpus))
    if change is not None:
        change(described)
    backend = Tokenizer.from_str(json.dumps(described))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=pad, bos_token="<s>" if bos else None
    )
    tokenizer.chat_template = template
    return tokenizer


def drop_merges(described: dict[str, Any]) -> None:
    """The same vocabulary, put together by other merges: the last half of them is gone."""
    merges = described["model"]["merges"]
    described["model"]["merges"] = merges[: len(merges) // 2]


def lower_case(described: dict[str, Any]) -> None:
    described["normalizer"] = json.loads(_normalised())["normalizer"]


def _normalised() -> str:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Lowercase()
    return backend.to_str()


def save_side(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    rows: int | None = None,
    positions: int = 256,
    eos: int | list[int] | None = None,
) -> Path:
    """A model and its tokenizer, as save_pretrained writes them; `eos` goes into generation_config.json."""
    config = Qwen3Config(
        vocab_size=rows or len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


def chat_rows(number: int = 24) -> list[dict[str, Any]]:
    """Conversations with gold and answers, all of them in order."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {n} + {n + 1}?"}],
            "gold": f"The sum is {n} + {n + 1}, so the answer is \\boxed{{{2 * n + 1}}}.",
            "answer": str(2 * n + 1),
        }
        for n in range(number)
    ]


def text_rows(number: int = 24) -> list[dict[str, Any]]:
    return [
        {**row, "prompt": f"Question {n}: {row['prompt'][0]['content']}\n"} for n, row in enumerate(chat_rows(number))
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Pair:
    """A student, a teacher, their data and a configuration, to be changed before `write`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.student: dict[str, Any] = {"tokenizer": bpe()}
        self.teacher: dict[str, Any] = {"tokenizer": bpe()}
        self.rows: list[dict[str, Any]] = chat_rows()
        self.held_out: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {
            "method": "stableopd",
            "rollout": {"num_prompts": 4, "num_generations": 2, "max_completion_length": 64},
            "evaluation": {"judge": "doctor_pairs:contains"},
            "max_steps": 2,
        }

    def set(self, section: str, **values: Any) -> None:
        self.settings[section] = {**self.settings.get(section, {}), **values}

    def write(self) -> Path:
        for name in ("student", "teacher"):
            save_side(self.folder / name, **getattr(self, name))
            self.set(name, model_name_or_path=str(self.folder / name))
        self.set("data", path=str(write_rows(self.folder / "train.jsonl", self.rows)))
        if self.held_out:
            self.set("evaluation", path=str(write_rows(self.folder / "held_out.jsonl", self.held_out)))
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        return path


def contains(completion: str, answer: str) -> bool:
    """A judge."""
    return f"{{{answer}}}" in completion


def raises(completion: str, answer: str) -> bool:
    raise RuntimeError("no \x1b[31mverdict")


def hangs(completion: str, answer: str) -> bool:
    while True:
        pass
