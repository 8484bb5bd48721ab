from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers.generation import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorasmith.config import GenerateConfig
from lorasmith.infer.sampling import choose, draws, occurrences

VOCAB = 20


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("top_k", [0, 1, 5, 50])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 1.0])
def test_draws_fall_as_in_the_distribution_of_transformers(top_k: int, top_p: float) -> None:
    config = GenerateConfig(temperature=1.7, top_k=top_k, top_p=top_p)
    scores = TemperatureLogitsWarper(1.7)(None, logits(1))
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    expected_V = TopPLogitsWarper(top_p)(None, scores).softmax(-1)[0]
    count = 4000
    draw_B = (torch.arange(count) + 0.5) / count
    ids_B = choose(logits(1).expand(count, -1), config, draw_B, None)
    share_V = torch.bincount(ids_B, minlength=VOCAB) / count
    torch.testing.assert_close(share_V, expected_V, atol=2 / count, rtol=0)


@pytest.mark.parametrize("draw", [0.0, 1.0])
def test_the_ends_of_the_draw_choose_ids_that_may_be_chosen(draw: float) -> None:
    config = GenerateConfig(top_k=3, top_p=0.8)
    top3 = logits(4).topk(3).indices
    ids_B = choose(logits(4), config, torch.full((4,), draw), None)
    assert (ids_B[:, None] == top3).any(-1).all()


@pytest.mark.parametrize("knobs", [(1.4, 0), (0.7, 0), (1.0, 1), (1.0, 2), (1.0, 3), (1.2, 2)])
def test_penalties_are_those_of_transformers_on_each_row_without_its_padding(
    knobs: tuple[float, int],
) -> None:
    penalty, size = knobs
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 9, 30]
    for seed in range(20):
        history = torch.full((4, 30), -1)
        expected = []
        for row, length in enumerate(lengths):
            ids = torch.randint(0, 6, (1, length), generator=generator)
            history[row, 30 - length :] = ids
            scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits(4, seed)[row : row + 1].clone())
            scores = NoRepeatNGramLogitsProcessor(size)(ids, scores) if size else scores
            expected.append(int(scores.argmax()))
        config = GenerateConfig(greedy=True, repetition_penalty=penalty, no_repeat_ngram_size=size)
        assert choose(logits(4, seed), config, None, history).tolist() == expected


def test_draws_hang_on_seed_prompt_and_occurrence_and_not_on_their_number() -> None:
    prompt, other = np.array([5, 6]), np.array([6, 5])
    first = draws(1, prompt, 0, 40)
    assert torch.equal(draws(1, prompt, 0, 7), first[:7])
    assert (
        len(
            {float(draws(*key, 1)) for key in [(1, prompt, 0), (2, prompt, 0), (1, other, 0), (1, prompt, 1)]}
        )
        == 4
    )
    assert bool(((first >= 0) & (first < 1)).all())


def test_occurrences_go_on_from_batch_to_batch() -> None:
    seen: Counter[bytes] = Counter()
    a, b = np.array([1]), np.array([2, 1])
    assert occurrences([a, b, a], seen) == [0, 0, 1]
    assert occurrences([b, a], seen) == [1, 2]
