"""How alike student and teacher are at the visited states."""

from __future__ import annotations

import pytest
import torch

from stableopd.observation import overlap
from stableopd.scoring import Scores
from stableopd.types import TokenScores


def scores(seed: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = 2 * torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(seed))
    log_p = logits.log_softmax(-1)
    top = log_p.topk(k)
    return log_p, top.indices, top.values


@pytest.mark.parametrize("k", [1, 4, 11])
def test_overlap_is_what_the_sets_say(k):
    log_s, s_ids, s_values = scores(1, k)
    log_t, t_ids, t_values = scores(2, k)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    entropy = -(log_t.exp() * log_t).sum(-1)
    found = overlap(
        Scores(logprobs=log_s[..., 0], topk_ids=s_ids, topk_logprobs=s_values),
        TokenScores(
            sampled_logprobs=None, temperature=1.0, model_id="", topk_ids=t_ids, topk_logprobs=t_values, entropy=entropy
        ),
        mask,
    )
    for row in range(3):
        for t in range(5):
            both = sorted(set(s_ids[row, t].tolist()) & set(t_ids[row, t].tolist()))
            p, gap = log_s[row, t, both].exp(), log_t[row, t, both] - log_s[row, t, both]
            advantage = float((p * gap).sum() / p.sum()) if both else 0.0
            expected = (len(both) / k, advantage, float(entropy[row, t])) if mask[row, t] else (0.0, 0.0, 0.0)
            values = (found[name][row, t].item() for name in found)
            assert list(found) == ["health/topk_overlap", "health/overlap_advantage", "teacher/entropy"]
            assert tuple(values) == pytest.approx(expected, abs=1e-5)
