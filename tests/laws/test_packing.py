"""Laws 1, 2 and 3: packing, sharing a prefix and cutting a step change neither loss nor gradients, and no
conversation sees another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from modules import KINDS, examples, tiny_module

from lorasmith.data.pack import lay_out, pack_rows
from lorasmith.evaluation.loss import held_out_loss
from lorasmith.model.packed import packed, takes_layout, to_device
from lorasmith.testing import model_laws
from lorasmith.testing.model_laws import packed_loss, plain_loss
from lorasmith.types import Batch, Example, Layout


def tuned(kind, dropout=0.0):
    return model_laws.tuned(tiny_module(kind), None, dropout=dropout, name=kind)


def assert_same(left, right, tolerance=1e-10):
    """Gradients relative to the largest of their tensor."""
    assert left[0] == pytest.approx(right[0], abs=1e-10)
    for name, gradient in left[1].items():
        error = (gradient - right[1][name]).abs().max() / gradient.abs().max()
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_is_its_conversations_one_by_one(kind):
    model, clock = tuned(kind)
    rows = examples()
    assert_same(packed_loss(model, clock, [lay_out(rows)]), plain_loss(model, rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cutting_a_step_into_rows_changes_nothing(kind, dropout):
    if dropout and not takes_layout(tiny_module(kind)):
        pytest.skip("one conversation at a time: masks follow the conversation, not the row")
    model, clock = tuned(kind, dropout)
    rows = examples(8)
    whole = packed_loss(model, clock, [lay_out(rows)])
    batches, laid_out = [], 0
    for indices in pack_rows([len(row) for row in rows], 30):
        batches.append(lay_out([rows[i] for i in indices], laid_out))
        laid_out += len(batches[-1].input_ids)
    assert len(batches) > 2
    assert_same(whole, packed_loss(model, clock, batches))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma2"])
def test_a_shared_prefix_is_computed_once_and_nothing_changes(kind):
    model, clock = tuned(kind)
    rows = examples(5, prefix=6)
    rows = [
        Example(
            r.input_ids,
            np.where(np.arange(len(r)) < 6, rows[0].labels[:6].tolist() + [0] * (len(r) - 6), r.labels),
        )
        for r in rows
    ]
    apart = packed_loss(model, clock, [lay_out(rows)])
    # transformers' RMSNorm computes in fp32 whatever the module's dtype, so sums of gradients round there
    assert_same(apart, packed_loss(model, clock, [shared_prefix(rows, 6)]), tolerance=1e-6)


def shared_prefix(rows, length):
    """One parent segment that all rows continue; its losses count once for each of them."""
    tails = [np.arange(length, len(row)) for row in rows]
    lengths = [length, *(len(tail) for tail in tails)]
    return Batch(
        input_ids=np.concatenate([rows[0].input_ids[:length], *(r.input_ids[length:] for r in rows)]),
        labels=np.concatenate([rows[0].labels[:length], *(r.labels[length:] for r in rows)]),
        weights=np.repeat([len(rows), *([1] * len(rows))], lengths).astype(np.float32),
        layout=Layout(
            starts=np.concatenate([[0], np.cumsum(lengths)]),
            parents=np.array([-1, *([0] * len(rows))]),
            position_ids=np.concatenate([np.arange(length), *tails]),
        ),
        token_numbers=np.arange(sum(lengths)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_moves_when_another_conversation_in_the_row_changes(kind):
    module = tiny_module(kind)
    rows, others = examples(4), examples(4, seed=1)
    size = len(rows[1])
    changed = [others[0], rows[1], others[2], others[3]]
    with torch.no_grad(), packed(module) as packed_module:
        before, after = (
            packed_module.logits(to_device(lay_out(r), torch.device("cpu"))) for r in (rows, changed)
        )
    own = [(r[0].num_targets, r[0].num_targets + r[1].num_targets) for r in (rows, changed)]
    assert size > 0
    torch.testing.assert_close(before[slice(*own[0])], after[slice(*own[1])], atol=1e-12, rtol=0)
    assert not torch.allclose(before[: own[0][0]][:1], after[: own[1][0]][:1]), "the control did not change"


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_loss_is_the_mean_over_all_targets(kind):
    module = tiny_module(kind)
    rows, attention = examples(7), module.config._attn_implementation
    batches = [lay_out(rows[:2]), lay_out(rows[2:])]
    assert held_out_loss(module, batches) == pytest.approx(plain_loss(module, rows)[0], abs=1e-10)
    assert module.config._attn_implementation == attention, "the module generates as before"


def test_gemma2_does_not_take_a_layout():
    assert [takes_layout(tiny_module(kind)) for kind in KINDS] == [kind != "gemma2" for kind in KINDS]
