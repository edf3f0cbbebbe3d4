"""Teachers in this process: duplicates, offloading, placement, several by name, streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd.config import StableOPDConfig, TeacherConfig
from stableopd.errors import ConfigError, ModelError
from stableopd.models import load_model
from stableopd.rollout.subsets import distinct_rows, finished_rollouts, joined_scores, select_rollouts, select_scores
from stableopd.teachers.local import LocalTeacher
from stableopd.teachers.offload import Offloaded
from stableopd.teachers.router import TeacherRouter
from stableopd.teachers.streams import AtTheEnd, begin_scoring
from stableopd.teaching import put_to_work
from stableopd.tokens import pad_left, pad_right
from stableopd.toy.models import build_model
from stableopd.types import FinishedRollout, RolloutBatch


def batch_of(rows, teachers=()):
    """A batch from (prompt ids, completion ids) pairs."""
    prompt_ids, prompt_mask = pad_left([prompt for prompt, _ in rows], 0)
    completion_ids, completion_mask = pad_right([completion for _, completion in rows], 0)
    return RolloutBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        sampling_logprobs=torch.zeros(completion_ids.shape),
        finish_reason=("stop",) * len(rows),
        prompt_index=tuple(range(len(rows))),
        teachers=tuple(teachers),
    )


@pytest.fixture(scope="module")
def models(tokenizer):
    return {
        name: build_model(num_layers=2, hidden_size=24, num_heads=2, tokenizer=tokenizer, seed=seed)
        for name, seed in (("one", 1), ("two", 2))
    }


def local(model, tokenizer, **options):
    from contextlib import nullcontext

    return LocalTeacher(
        model, model_id="t", vocab_size=len(tokenizer), token_budget=64, autocast=nullcontext, **options
    )


ROWS = [([3, 4, 5], [6, 7]), ([3, 4], [5, 6, 7, 8]), ([3, 4, 5], [6, 7]), ([9], [1]), ([3, 4], [5, 6, 7, 8])]


def test_equal_rows_are_read_once_and_get_equal_scores(models, tokenizer):
    teacher = local(models["one"], tokenizer)
    seen = []
    hook = models["one"].model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        whole = teacher.score(batch_of(ROWS), temperature=1.0, topk=3)
    finally:
        hook.remove()
    assert sum(seen) <= 3 * 5  # the three distinct rows, less their last tokens, padded at most
    alone = [teacher.score(batch_of([row]), temperature=1.0, topk=3) for row in ROWS]
    for row, (scores, (_, completion)) in enumerate(zip(alone, ROWS, strict=True)):
        width = len(completion)
        torch.testing.assert_close(whole.sampled_logprobs[row, :width], scores.sampled_logprobs[0])
        assert torch.equal(whole.topk_ids[row, :width], scores.topk_ids[0])
        torch.testing.assert_close(whole.entropy[row, :width], scores.entropy[0])
        assert not whole.sampled_logprobs[row, width:].any()


def test_equal_rows_share_their_hidden_states(models, tokenizer):
    whole = local(models["one"], tokenizer).score(batch_of(ROWS), temperature=1.0, states=True)
    assert [len(states) for states in whole.states] == [len(completion) for _, completion in ROWS]
    assert whole.states[0] is whole.states[2]


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 3), min_size=1, max_size=2), st.lists(st.integers(1, 2), min_size=1, max_size=2)
        ),
        min_size=1,
        max_size=8,
    )
)
@settings(deadline=None)
def test_distinct_rows_rebuild_the_batch(rows):
    batch = batch_of(rows)
    kept, place = distinct_rows(batch)
    told = finished_rollouts(batch)
    assert [(list(one.prompt_ids), list(one.completion_ids)) for one in told] == rows
    assert len({told[row] for row in kept}) == len(kept)
    assert [told[kept[at]] for at in place] == told
    assert finished_rollouts(select_rollouts(batch, kept)) == [told[row] for row in kept]


def test_an_offloaded_teacher_scores_the_same_and_leaves_its_head_only(models, tokenizer):
    import copy

    model = copy.deepcopy(models["one"])
    expected = local(models["one"], tokenizer).score(batch_of(ROWS), temperature=0.7, topk=2)
    teacher = local(model, tokenizer, offload_from=torch.device("cpu"))
    found = teacher.score(batch_of(ROWS), temperature=0.7, topk=2)
    assert torch.equal(found.sampled_logprobs, expected.sampled_logprobs)
    assert torch.equal(found.topk_ids, expected.topk_ids)


def test_offloading_takes_back_what_it_lent_even_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).requires_grad_(False)
    kept = model[0].bias
    before = {name: array.clone() for name, array in model.state_dict().items()}
    offloaded = Offloaded(model, torch.device("cpu"), kept=[kept])

    def work():
        for array in (*model.parameters(), *model.buffers()):
            array.data = torch.zeros_like(array)  # a lent copy, as on another device
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), offloaded.at_work():
        work()
    after = model.state_dict()
    assert not after.pop("0.bias").any()  # stays where it is
    assert all(torch.equal(array, before[name]) for name, array in after.items())


def test_each_row_is_scored_by_the_teacher_it_names(models, tokenizer):
    teachers = {name: local(model, tokenizer) for name, model in models.items()}
    names = ("two", "one", "one", "two", "one")
    batch = batch_of(ROWS, names)
    routed = TeacherRouter(teachers).score(batch, temperature=0.8, topk=4)
    for row, name in enumerate(names):
        alone = teachers[name].score(batch_of([ROWS[row]]), temperature=0.8, topk=4)
        width = len(ROWS[row][1])
        torch.testing.assert_close(routed.sampled_logprobs[row, :width], alone.sampled_logprobs[0])
        assert torch.equal(routed.topk_ids[row, :width], alone.topk_ids[0])
    other = teachers["one"].score(batch_of([ROWS[0]]), temperature=0.8)
    assert not torch.allclose(routed.sampled_logprobs[0, :2], other.sampled_logprobs[0])


def test_a_router_refuses_an_unknown_name_and_whole_distributions(models, tokenizer):
    router = TeacherRouter({name: local(model, tokenizer) for name, model in models.items()})
    with pytest.raises(ConfigError, match="names the teacher 'three'; known: one, two"):
        router.score(batch_of(ROWS[:1], ["three"]), temperature=1.0)
    with pytest.raises(ConfigError, match="needs one teacher"):
        router.score(batch_of(ROWS[:1], ["one"]), temperature=1.0, states=True)


def test_a_routed_stream_tells_each_teacher_of_its_own_rollouts():
    class Recorder:
        def __init__(self):
            self.added, self.closed = [], False

        def begin(self, *, temperature, topk=0):
            return self

        def score(self, rollouts, *, temperature, topk=0, states=False): ...

        def add(self, rollout):
            self.added.append(rollout)

        def result(self, rollouts): ...

        def close(self):
            self.closed = True

    teachers = {"one": Recorder(), "two": Recorder()}
    stream = TeacherRouter(teachers).begin(temperature=1.0)
    told = [FinishedRollout(prompt_ids=(1,), completion_ids=(2,), teacher=name) for name in ("two", "one", "two")]
    for rollout in told:
        stream.add(rollout)
    stream.close()
    assert teachers["one"].added == [told[1]]
    assert teachers["two"].added == [told[0], told[2]]
    assert teachers["one"].closed
    assert teachers["two"].closed


def test_a_local_teacher_scores_at_the_end_of_a_stream(models, tokenizer):
    teacher = local(models["one"], tokenizer)
    stream = begin_scoring(teacher, temperature=1.0)
    assert isinstance(stream, AtTheEnd)
    for rollout in finished_rollouts(batch_of(ROWS)):
        stream.add(rollout)
    found = stream.result(batch_of(ROWS))
    assert torch.equal(found.sampled_logprobs, teacher.score(batch_of(ROWS), temperature=1.0).sampled_logprobs)


@given(st.permutations(range(5)), st.integers(1, 4))
@settings(deadline=None)
def test_scores_in_parts_are_put_back_in_their_places(order, cut):
    from stableopd.types import TokenScores

    whole = TokenScores(sampled_logprobs=torch.arange(10.0).reshape(5, 2), temperature=1.0, model_id="t")
    parts = [(rows, select_scores(whole, rows)) for rows in (order[:cut], order[cut:])]
    assert torch.equal(joined_scores(parts, 5).sampled_logprobs, whole.sampled_logprobs)


def test_a_teacher_with_a_device_map_gives_the_same_scores(checkpoints, tokenizer):
    settings_of = {"model_name_or_path": str(checkpoints / "teacher"), "dtype": "float32"}
    plain = load_model(TeacherConfig(**settings_of), "teacher")
    places = {"model": "cpu", "lm_head": "cpu"}
    placed = load_model(TeacherConfig(**settings_of, device_map=places), "teacher")
    expected = local(plain, tokenizer).score(batch_of(ROWS), temperature=1.0)
    found = local(placed, tokenizer).score(batch_of(ROWS), temperature=1.0)
    torch.testing.assert_close(found.sampled_logprobs, expected.sampled_logprobs)


def test_a_teacher_that_does_not_fit_its_devices_is_refused_with_what_to_do(checkpoints, tmp_path):
    places = {"model": "disk", "lm_head": "cpu"}
    config = TeacherConfig(model_name_or_path=str(checkpoints / "teacher"), device_map=places)
    with pytest.raises(ModelError, match=r"teacher\.device_map.*(offload|quantization)"):
        load_model(config, "teacher")


def test_a_teacher_of_half_precision_scores_within_its_rounding(checkpoints, tokenizer):
    at = str(checkpoints / "teacher")
    exact = local(load_model(TeacherConfig(model_name_or_path=at, dtype="float32"), "teacher"), tokenizer)
    half = local(load_model(TeacherConfig(model_name_or_path=at, dtype="bfloat16"), "teacher"), tokenizer)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    one, other = (teacher.score(batch_of(ROWS), temperature=1.0).sampled_logprobs for teacher in (exact, half))
    assert other.dtype == torch.float32
    torch.testing.assert_close(other, one, atol=0.05, rtol=0)


def test_a_quantised_teacher_is_loaded_through_transformers_and_stays_close(tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes")
    model = build_model(num_layers=2, hidden_size=64, num_heads=2, tokenizer=tokenizer, seed=3)
    model.save_pretrained(tmp_path)
    given_settings = {"model_name_or_path": str(tmp_path), "dtype": "float32"}
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    quantised = load_model(TeacherConfig(**given_settings, quantization=quantization, device_map="cpu"), "teacher")
    kinds = {type(module).__name__ for module in quantised.modules()}
    assert "Linear8bitLt" in kinds
    exact = local(load_model(TeacherConfig(**given_settings), "teacher"), tokenizer)
    one = exact.score(batch_of(ROWS), temperature=1.0).sampled_logprobs
    other = local(quantised, tokenizer).score(batch_of(ROWS), temperature=1.0).sampled_logprobs
    assert 0 < (one - other).abs().max() < 0.3


def test_an_unknown_quantisation_is_told_with_its_key(checkpoints):
    config = TeacherConfig(model_name_or_path=str(checkpoints / "teacher"), quantization={"quant_method": "magic"})
    with pytest.raises((ConfigError, ModelError), match=r"teacher\.quantization is not what transformers takes"):
        load_model(config, "teacher")


def test_an_offloaded_teacher_keeps_its_head_at_hand_for_losses_over_the_vocabulary(models, tokenizer):
    import copy

    config = StableOPDConfig(teacher={"model_name_or_path": "t", "offload": True})
    from contextlib import nullcontext

    teacher, head = put_to_work(
        config,
        {"teacher": copy.deepcopy(models["one"])},
        {},
        device=torch.device("cpu"),
        vocab_size=len(tokenizer),
        autocast=nullcontext,
    )
    states = teacher.score(batch_of(ROWS), temperature=1.0, states=True).states
    logits = head.logits(states[1])
    expected = teacher.score(batch_of(ROWS), temperature=1.0).sampled_logprobs[1]
    found = logits.log_softmax(-1).gather(1, torch.tensor(ROWS[1][1])[:, None])[:, 0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("settings_given", "told"),
    [
        ({"teacher": {"server_url": "http://h:1", "offload": True}}, "offload is for a model in this process"),
        (
            {"teacher": {"model_name_or_path": "m", "offload": True, "device_map": "auto"}},
            "offload moves a whole model",
        ),
        ({"teacher": {"server_url": "h:1"}}, "must begin with http"),
        ({"teachers": {"a": {"model_name_or_path": "m"}, "b": {"model_name_or_path": "n"}}}, "data.teacher_column"),
        ({"teachers": {"a": {}}}, "teachers.a has neither"),
        ({"teacher": {"model_name_or_path": "m"}, "teachers": {"a": {"model_name_or_path": "m"}}}, "both given"),
        ({"data": {"teacher_column": "who"}}, "there are none: set teachers"),
        (
            {
                "teachers": {"a": {"model_name_or_path": "m"}, "b": {"model_name_or_path": "n"}},
                "data": {"teacher_column": "who"},
                "objective": {"distill": {"divergence": "reverse_kl"}},
            },
            "needs the whole distribution of one teacher",
        ),
    ],
)
def test_teachers_that_cannot_be_are_refused_with_the_reason(settings_given, told):
    with pytest.raises(ConfigError, match=told):
        StableOPDConfig(**settings_given)
