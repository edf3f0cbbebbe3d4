"""The toy tokenizer: a character is a token."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stableopd.toy.task import ALPHABET, EOS, PAD


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A character-level tokenizer of the toy alphabet, ids in the order of `ALPHABET`.

    `$` (end) and `_` (padding) are special tokens. Nothing is added to a text, nothing is put between
    the characters when decoding, and a character outside the alphabet is an error.
    """
    backend = Tokenizer(models.WordLevel({character: index for index, character in enumerate(ALPHABET)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
