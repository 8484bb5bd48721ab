from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from byte_chat import byte_model, random_llama, random_transnormer
from modules import KINDS, tiny_module
from transformers import DynamicCache

from lorasmith.config import GenerateConfig
from lorasmith.infer.cache import RoomyLayer, keeps_everything, new_cache
from lorasmith.infer.continuation import common_prefix, packed_prompts, split_by_length
from lorasmith.infer.decode import decode


def test_a_roomy_layer_holds_what_a_dynamic_one_holds_past_its_room() -> None:
    ours, theirs = RoomyLayer(), DynamicCache()
    for tokens in [3, *[1] * 70, 5, 1]:
        keys, values = torch.randn(2, 3, tokens, 4), torch.randn(2, 3, tokens, 5)
        expected = theirs.update(keys, values, 0)
        got = ours.update(keys, values)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    ours.reorder_cache(torch.tensor([1]))
    keys, values = ours.update(keys[1:], values[1:])
    assert (keys.shape, ours.get_seq_length()) == ((1, 3, 80, 4), 80)
    assert torch.equal(keys[0, :, :79], expected[0][1])


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_cache_of_the_whole_past_is_shared(kind: str) -> None:
    cache = new_cache(tiny_module(kind))
    if kind == "transnormer":
        assert cache is None
    else:
        assert keeps_everything(cache) == (kind != "gemma2")


@pytest.mark.parametrize("pass_cost", [0, 5, 30, 10**6])
def test_groups_read_the_fewest_tokens(pass_cost: int) -> None:
    lengths, shared = [3, 30, 29, 4, 3, 12, 9, 28], 2
    order = sorted(range(8), key=lambda row: -lengths[row])

    def cost(groups: list[list[int]]) -> int:
        return sum(pass_cost + len(rows) * (lengths[rows[0]] - shared) for rows in groups)

    cuts = (c for n in range(8) for c in itertools.combinations(range(1, 8), n))
    all_ways = [[order[a:b] for a, b in itertools.pairwise([0, *cut, 8])] for cut in cuts]
    groups = split_by_length(order, lengths, shared, pass_cost)
    assert list(itertools.chain(*groups)) == order
    assert cost(groups) == min(map(cost, all_ways))


def test_a_common_prefix_leaves_a_token_of_each_prompt() -> None:
    a, b, c = np.array([1, 2, 3]), np.array([1, 2]), np.array([1, 3, 3, 4])
    assert [common_prefix(rows) for rows in ([a, b], [a, c], [a, a], [b[1:], a], [a])] == [1, 1, 2, 0, 2]
    layout, ids = packed_prompts([a, b, c])
    assert ids.tolist() == [1, 2, 3, 2, 3, 3, 4]
    assert layout.parents.tolist() == [-1, 0, 0, 0]
    assert layout.position_ids.tolist() == [0, 1, 2, 1, 1, 2, 3]


@pytest.mark.parametrize("make", [random_llama, random_transnormer])
def test_a_shared_start_is_read_once(make) -> None:  # type: ignore[no-untyped-def]
    module = make()
    columns: list[int] = []
    module.get_input_embeddings().register_forward_hook(lambda _, args, __: columns.append(args[0].numel()))
    start = np.arange(50)
    prompts = [np.concatenate([start, np.arange(100, 100 + length)]) for length in (3, 4, 5, 5)]
    decode(byte_model(module), prompts, GenerateConfig(greedy=True, max_new_tokens=1))
    assert sum(columns) <= 50 + 4 * 5


def test_full_rows_do_not_leave_the_positions_of_the_model() -> None:
    module, positions = random_llama(max_positions=40), []
    module.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    prompts = [np.arange(length) for length in (38, 5)]
    config = GenerateConfig(greedy=True, max_new_tokens=100)
    answers = decode(byte_model(module, stops=[]), prompts, config, compact_at=0.0)
    assert [answer.num_tokens for answer in answers] == [2, 35]
    assert max(positions) == 39
