"""Laws 1, 2 and 3: packing, sharing a prefix and cutting a step change neither loss nor gradients, and no
conversation sees another."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from modules import KINDS, examples, tiny_module
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.glm.modeling_glm import GlmRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import lorasmith as ls
from lorasmith.batching.pack import pack
from lorasmith.evaluation.loss import held_out_loss
from lorasmith.model.packed import as_computed, length_on_gpu, packed, padded, takes_layout, to_device
from lorasmith.runs.progress import SilentReporter
from lorasmith.testing import model_laws
from lorasmith.testing.model_laws import packed_loss, plain_loss, step_rows
from lorasmith.types import Example


def tuned(kind, dropout=0.0):
    model, clock = model_laws.tuned(tiny_module(kind), None, dropout=dropout, name=kind)
    for module in model.modules():
        if isinstance(module, (LlamaRMSNorm, GlmRMSNorm, Qwen2RMSNorm)):
            # Theirs rounds to fp32 whatever the dtype, so gradients would hang on the order of their sums.
            shape, eps = module.weight.shape, module.variance_epsilon
            module.forward = partial(F.rms_norm, normalized_shape=shape, weight=module.weight, eps=eps)
    return model, clock


def family_of_conversations():
    """Two heads with a common start, an exact duplicate, and the beginning of another as one of its own."""
    rows, others = examples(4, prefix=12), examples(4, seed=1, prefix=12)
    for row in others:
        row.input_ids[:6], row.labels[:6] = rows[0].input_ids[:6], rows[0].labels[:6]
    longest = max(rows, key=len)
    beginning = Example(longest.input_ids[:-1], longest.labels[:-1])
    return [rows[0], others[0], *others[1:], *rows, beginning]


def assert_same(left, right, tolerance=1e-11):
    """Gradients relative to the largest of their tensor."""
    assert left[0] == pytest.approx(right[0], abs=tolerance)
    for name, gradient in left[1].items():
        error = (gradient - right[1][name]).abs().max() / gradient.abs().max()
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_is_packed_is_one_by_one(kind):
    model, clock = tuned(kind)
    rows = family_of_conversations()
    shared, apart = step_rows(model, rows[::-1]), step_rows(model, rows, share_prefixes=False)
    plain = plain_loss(model, rows)
    assert_same(packed_loss(model, clock, apart), plain)
    assert_same(packed_loss(model, clock, shared), plain)
    if takes_layout(model):
        assert shared[0].layout.parents.max() > 0, "the tree has two levels"
        assert len(shared[0].input_ids) < 0.7 * len(apart[0].input_ids)
        assert shared[0].weights.max() == len(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share_prefixes", [False, True], ids=["apart", "shared"])
def test_cutting_a_step_into_rows_changes_nothing_with_dropout_on(kind, share_prefixes):
    model, clock = tuned(kind, dropout=0.3)
    rows = family_of_conversations()
    whole = packed_loss(model, clock, step_rows(model, rows, share_prefixes))
    num_rows = set()
    for max_tokens in (50, 1):
        batches = step_rows(model, rows, share_prefixes, max_tokens)
        num_rows.add(len(batches))
        assert_same(whole, packed_loss(model, clock, batches))
    assert len(num_rows) == (2 if takes_layout(model) else 1)
    clock.step = 1
    assert abs(whole[0] - packed_loss(model, clock, batches)[0]) > 1e-3, "the control has other masks"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma2"])
@pytest.mark.parametrize("share_prefixes", [False, True], ids=["apart", "shared"])
def test_padding_of_a_row_changes_nothing_with_dropout_on(kind, share_prefixes):
    model, clock = tuned(kind, dropout=0.3)
    batches = step_rows(model, family_of_conversations(), share_prefixes, max_tokens=90)
    assert all(as_computed(batch, torch.device("cpu"), 1024) is batch for batch in batches)
    wider = [as_computed(batch, torch.device("cuda"), None) for batch in batches]
    assert all(len(batch.input_ids) % 128 == 0 for batch in wider)
    assert sum(len(batch.input_ids) for batch in wider) > sum(len(batch.input_ids) for batch in batches)
    assert [b.num_targets for b in wider] == [b.num_targets for b in batches]
    assert [b.num_tokens for b in wider] == [b.num_tokens for b in batches]
    assert_same(packed_loss(model, clock, batches), packed_loss(model, clock, wider))
    static = [as_computed(batch, torch.device("cuda"), 1024) for batch in batches]
    assert {len(batch.input_ids) for batch in static} == {1024}
    assert_same(packed_loss(model, clock, batches), packed_loss(model, clock, static))


@pytest.mark.parametrize(
    ("tokens", "row_length", "length"),
    [
        *((1, None, 128), (128, None, 128), (129, None, 256), (700, 512, 768), (1, 1000, 1024)),
        *((1, 1024, 1024), (1024, 1024, 1024), (1025, 1024, 1152), (1025, 2048, 2048)),
    ],
)
def test_rows_have_few_lengths_on_a_gpu(tokens, row_length, length):
    assert length_on_gpu(tokens, row_length) == length


def test_padding_has_positions_that_every_model_has():
    """Learned positions end where the context does, which a padded row may exceed."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    module = GPT2LMHeadModel(GPT2Config(**sizes)).double().eval()
    [batch] = step_rows(module, examples(4))
    wide = padded(batch, 256)
    assert takes_layout(module)
    assert wide.layout.position_ids.max() == batch.layout.position_ids.max() < 64
    with torch.no_grad(), packed(module) as rows:
        own, wider = (float(rows.loss_sum(to_device(some, rows.device))) for some in (batch, wide))
    assert wider == pytest.approx(own, abs=1e-11)


def test_a_row_that_is_long_enough_is_left_alone():
    [batch] = step_rows(tiny_module("llama3"), examples(4))
    assert padded(batch, len(batch.input_ids)) is batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share_prefixes", [False, True], ids=["apart", "shared"])
def test_no_token_moves_when_another_conversation_in_the_row_changes(kind, share_prefixes):
    module = tiny_module(kind)
    rows = examples(4, prefix=12)
    changed = [*rows[:2], *(Example(r.input_ids.copy(), r.labels) for r in rows[2:])]
    for row in changed[2:]:
        row.input_ids[12:] = (row.input_ids[12:] + 1) % 90
    before, after = (logits_by_number(module, step, share_prefixes) for step in (rows, changed))
    own = {tuple(row.input_ids) for row in rows[:2]}
    assert own < set(before)
    for ids in own:
        torch.testing.assert_close(before[ids], after[ids], atol=1e-12, rtol=0)
    assert set(before) != set(after), "the control did not change"


def logits_by_number(module, rows, share_prefixes):
    """The logits of each conversation's last label, by its ids."""
    found = {}
    with torch.no_grad(), packed(module) as rows_module:
        for batch in step_rows(module, rows, share_prefixes):
            on_device = to_device(batch, torch.device("cpu"))
            logits = dict(zip(on_device.rows.tolist(), rows_module.logits(on_device), strict=True))
            layout = batch.layout
            for segment in set(range(len(layout.parents))) - set(layout.parents.tolist()):
                ids, above = [], segment
                while above >= 0:
                    ids = [*batch.input_ids[layout.starts[above] : layout.starts[above + 1]], *ids]
                    above = layout.parents[above]
                found[tuple(ids)] = logits[layout.starts[segment + 1] - 1]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_loss_is_the_mean_over_all_targets(kind):
    module = tiny_module(kind)
    rows, attention = family_of_conversations(), module.config._attn_implementation
    batches = step_rows(module, rows, max_tokens=60)
    assert len(batches) > 1
    assert held_out_loss(module, batches) == pytest.approx(plain_loss(module, rows)[0], abs=1e-10)
    assert module.config._attn_implementation == attention, "the module generates as before"


def test_gemma2_does_not_take_a_layout():
    assert [takes_layout(tiny_module(kind)) for kind in KINDS] == [kind != "gemma2" for kind in KINDS]


def test_a_module_that_takes_no_layout_is_never_given_two_conversations():
    module = tiny_module("gemma2")
    [together] = pack(examples(2), 100, share_prefixes=False)
    with packed(module) as rows_module, pytest.raises(AssertionError, match="one conversation at a time"):
        rows_module.logits(to_device(together, torch.device("cpu")))


@pytest.mark.parametrize("kind", ["llama3", "gemma2"])
def test_a_run_s_losses_do_not_depend_on_sharing_or_on_cuts(tmp_path, kind):
    """Through the front door, without dropout, where sharing may change nothing at all."""

    def losses(name, **train):
        config = ls.TrainConfig(num_epochs=2, batch_size=5, logging_steps=1, learning_rate=1e-2, **train)
        run = ls.train(
            tiny_module(kind, torch.float64),
            family_of_conversations(),
            output_dir=tmp_path / name,
            lora=ls.LoraConfig(r=4, lora_dropout=0.0),
            train=config,
            reporter=SilentReporter(),
        )
        lines = (run.output_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    curve = losses("shared")
    for other in (losses("apart", share_prefixes=False), losses("cut", max_tokens=30)):
        assert other == pytest.approx(curve, abs=1e-5)
