"""The toy tokenizer and models: one id per character through save and load, and the intended initial weights."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stableopd.toy.models import build_model, build_student, build_teacher
from stableopd.toy.task import ALPHABET
from stableopd.toy.tokenizer import build_tokenizer

TEXT = "1234:1471;w1360;y=0$"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module", params=["built", "loaded", "loaded beside a model"])
def either(request, tokenizer, tmp_path_factory):
    if request.param == "built":
        return tokenizer
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    if request.param == "loaded beside a model":
        build_student(tokenizer, seed=0).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


class TestTokenizer:
    def test_a_character_is_a_token_and_nothing_is_added(self, either):
        assert either("1234:")["input_ids"] == [1, 2, 3, 4, 10]
        assert either(ALPHABET)["input_ids"] == list(range(17))

    def test_decoding_gives_the_text_back(self, either):
        assert either.decode(either(TEXT)["input_ids"]) == TEXT

    def test_special_tokens_can_be_skipped(self, either):
        assert either.decode(either(TEXT + "__")["input_ids"], skip_special_tokens=True) == TEXT[:-1]

    def test_end_and_padding_are_known(self, either):
        assert (either.eos_token, either.eos_token_id) == ("$", 15)
        assert (either.pad_token, either.pad_token_id) == ("_", 16)
        assert either.bos_token is None
        assert len(either) == 17

    def test_prompts_are_padded_on_the_left(self, either):
        batch = either(["1:", "1234:"], padding=True, return_tensors="pt")
        assert batch["input_ids"].tolist() == [[16, 16, 16, 1, 10], [1, 2, 3, 4, 10]]
        assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]

    def test_a_foreign_character_is_an_error(self, either):
        with pytest.raises(Exception, match="UNK"):
            either("12x4:")


class TestModels:
    def test_sizes(self, tokenizer):
        assert build_teacher(tokenizer, seed=0).num_parameters() == 166_720
        assert build_student(tokenizer, seed=0).num_parameters() == 12_504

    def test_architecture(self, tokenizer):
        config = build_teacher(tokenizer, seed=0).config
        assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (4, 64, 128)
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 16)
        assert config.rope_parameters["rope_theta"] == 1000
        assert not config.tie_word_embeddings

    def test_head_is_not_tied_to_the_embedding(self, tokenizer):
        model = build_student(tokenizer, seed=0)
        assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()

    def test_initial_weights_have_the_intended_spread(self, tokenizer):
        model = build_model(num_layers=3, hidden_size=96, num_heads=4, tokenizer=tokenizer, seed=0)
        into_residual = 1 / math.sqrt(2 * 3)
        expected = {
            "embed_tokens": 0.5,
            "o_proj": into_residual / math.sqrt(96),
            "down_proj": into_residual / math.sqrt(192),
        }
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                assert weight.eq(1).all(), name
                continue
            module = name.split(".")[-2]
            assert weight.std().item() == pytest.approx(expected.get(module, 1 / math.sqrt(96)), rel=0.08), name
            assert abs(weight.mean().item()) < 0.1 * weight.std().item(), name

    def test_the_seed_alone_decides_the_weights(self, tokenizer):
        torch.manual_seed(1)
        first = build_student(tokenizer, seed=7).state_dict()
        torch.manual_seed(2)
        again = build_student(tokenizer, seed=7).state_dict()
        other = build_student(tokenizer, seed=8).state_dict()
        assert all(first[name].equal(again[name]) for name in first)
        assert not first["lm_head.weight"].equal(other["lm_head.weight"])

    def test_global_random_state_is_undisturbed(self, tokenizer):
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        build_student(tokenizer, seed=0)
        assert torch.rand(4).equal(expected)

    def test_generation_stops_at_the_end_token(self, tokenizer):
        model = build_student(tokenizer, seed=0)
        for config in (model.config, model.generation_config):
            assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (15, 16, None)

    def test_model_survives_save_and_load(self, tokenizer, tmp_path):
        model = build_student(tokenizer, seed=0)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        assert loaded.generation_config.eos_token_id == 15

    def test_heads_of_odd_width_are_refused(self, tokenizer):
        with pytest.raises(ValueError, match="even width"):
            build_model(num_layers=1, hidden_size=24, num_heads=8, tokenizer=tokenizer, seed=0)
