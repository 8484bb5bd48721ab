"""Our LoRA layer within peft: the plain case is ours and equal to peft's, every other case is peft's own."""

from __future__ import annotations

import copy
import io

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasmith.adapters import lora_linear as room
from lorasmith.adapters.dropout import DropoutClock, StatelessDropout, use_stateless_dropout
from lorasmith.adapters.lora import linear_names
from lorasmith.adapters.lora_linear import LoraLinear, use_fast_linear


class Two(nn.Module):
    """Two linear layers, one with a bias, and an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)

    def forward(self, ids):
        return self.down(torch.tanh(self.up(self.embedding(ids))))


IDS = torch.tensor([[1, 4, 4, 2, 8, 0, 3]])


def adapted(fast, *, dropout=0.3, clock=None, base=Two, **lora):
    torch.manual_seed(0)
    module = base()
    knobs = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"], "init_lora_weights": False, **lora}
    config = peft.LoraConfig(lora_dropout=dropout, **knobs)
    if fast:
        use_fast_linear(config)
    model = peft.get_peft_model(module, config).double()
    use_stateless_dropout(model, clock or DropoutClock(3))
    return model.train()


def outcome(model, ids=IDS):
    model.zero_grad()
    y = model(ids)
    if y.requires_grad:
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **gradients}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-12, rtol=0, msg=name)


@pytest.fixture
def calls(monkeypatch):
    """How often the fast road is taken; it runs for real."""
    seen = []

    def counted(*args):
        seen.append(args)
        return real(*args)

    real = room.lora_linear
    monkeypatch.setattr(room, "lora_linear", counted)
    return seen


def test_layers_names_and_files_are_peft_s(tmp_path):
    ours, theirs = adapted(True), adapted(False)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    layers = [m for m in ours.modules() if isinstance(m, LoraLayer)]
    assert [type(layer) for layer in layers] == [LoraLinear, LoraLinear]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_the_plain_case_is_peft_s_and_fast(dropout, lora, calls):
    theirs = outcome(adapted(False, dropout=dropout, **lora))
    assert calls == []
    ours = outcome(adapted(True, dropout=dropout, **lora))
    assert len(calls) == 2
    assert len(ours) == 5
    assert_equal(ours, theirs)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"target_modules": ["embedding"]},
        {"modules_to_save": ["embedding"], "use_dora": True},
    ],
    ids=str,
)
def test_what_is_not_plain_stays_peft_s_own(lora, calls):
    kwargs = {"dropout": 0.0 if lora.get("target_modules") else 0.3, **lora}
    if lora.get("bias") == "all":
        kwargs["target_modules"] = ["up"]
    assert_equal(outcome(adapted(True, **kwargs)), outcome(adapted(False, **kwargs)))
    assert calls == []


def test_a_module_saved_in_full_trains_beside_the_fast_layers(calls):
    lora = {"modules_to_save": ["embedding"]}
    assert_equal(outcome(adapted(True, **lora)), outcome(adapted(False, **lora)))
    assert len(calls) == 2


def test_evaluation_drops_nothing_and_is_fast(calls):
    ours, theirs = adapted(True).eval(), adapted(False).eval()
    with torch.no_grad():
        assert_equal(outcome(ours), outcome(theirs))
    assert len(calls) == 2
    assert calls[0][-1] is None


def test_at_rest_it_is_its_forward_bit_by_bit_and_asks_nothing(monkeypatch):
    model = adapted(True).eval()
    layer = model.base_model.model.up
    forward, x = layer.at_rest(), torch.randn(2, 6, dtype=torch.float64)
    asked, real = [], LoraLinear._is_plain
    monkeypatch.setattr(LoraLinear, "_is_plain", lambda *args: asked.append(args) or real(*args))
    with torch.no_grad():
        at_rest = forward(x)
        assert asked == []
        assert torch.equal(at_rest, layer(x))
    assert len(asked) == 1


@pytest.mark.parametrize("change", ["train", "merge", "disable", "hook", "dora"])
def test_what_may_change_or_is_not_plain_never_rests(change):
    model = adapted(True, use_dora=change == "dora").eval()
    layer = model.base_model.model.up
    changes = {
        "train": lambda: model.train(),
        "merge": lambda: layer.merge(),
        "disable": lambda: layer.enable_adapters(False),
        "hook": lambda: layer.register_forward_hook(lambda *_: None),
        "dora": lambda: None,
    }
    changes[change]()
    assert layer.at_rest() is None


def test_merged_disabled_and_unloaded():
    ours = adapted(True).eval()
    y = outcome(ours)["y"]
    ours.merge_adapter()
    torch.testing.assert_close(outcome(ours)["y"], y, atol=1e-12, rtol=0)
    ours.unmerge_adapter()
    with ours.disable_adapter():
        bare = outcome(ours)["y"]
    assert (bare - y).abs().max() > 1e-3
    torch.testing.assert_close(outcome(ours)["y"], y, atol=1e-12, rtol=0)
    merged = ours.merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(IDS), y, atol=1e-12, rtol=0)


def test_a_second_adapter_and_both_at_once():
    models = [adapted(fast) for fast in (True, False)]
    for model in models:
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
        model.add_adapter("second", config)
        model.eval()
    for active in ("second", ["default", "second"]):
        for model in models:
            model.base_model.set_adapter(active)
        assert_equal(*(outcome(model) for model in models))
    mixed = [m(IDS.repeat(2, 1), adapter_names=["second", "__base__"]) for m in models]
    torch.testing.assert_close(*mixed, atol=1e-12, rtol=0)


def test_peft_s_own_dropout_is_never_passed_over(calls):
    """An adapter that was loaded for training outside our clock keeps torch's generator."""
    model = adapted(True)
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        layer.lora_dropout["default"] = nn.Dropout(0.3)
    outcome(model)
    assert calls == []
    outcome(model.eval())
    assert len(calls) == 2


@pytest.mark.parametrize("road", ["hook", "wrapped forward"])
def test_a_watched_base_is_called_as_a_module(road, calls):
    """accelerate moves offloaded weights in such a wrapper."""
    model, seen = adapted(True), []
    base = model.base_model.model.up.base_layer
    if road == "hook":
        base.register_forward_hook(lambda *_: seen.append(1))
    else:
        base.forward = lambda x, real=base.forward: seen.append(1) or real(x)
    assert_equal(outcome(model), outcome(adapted(False)))
    assert (len(seen), len(calls)) == (1, 1)


def test_a_subclass_of_linear_is_left_to_peft():
    class Quantised(nn.Linear):
        pass

    class Base(Two):
        def __init__(self):
            super().__init__()
            self.up = Quantised(6, 8)

    model = adapted(True, base=Base)
    assert type(model.base_model.model.up) is Linear
    assert type(model.base_model.model.down) is LoraLinear


def test_masks_follow_the_clock():
    clock = DropoutClock(3)
    model = adapted(True, clock=clock)
    first = outcome(model)
    assert_equal(outcome(model), first)
    clock.token_numbers = torch.arange(7)
    assert_equal(outcome(model), first)
    clock.step = 1
    assert not torch.equal(outcome(model)["y"], first["y"])


def test_recomputing_activations_changes_no_bit():
    class Recomputed(Two):
        def forward(self, ids):
            return checkpoint(super().forward, ids, use_reentrant=False, preserve_rng_state=False)

    kept, recomputed = outcome(adapted(True)), outcome(adapted(True, base=Recomputed))
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_it_can_be_copied_and_pickled():
    model = adapted(True).eval()
    file = io.BytesIO()
    torch.save(copy.deepcopy(model.base_model.model.up), file)
    file.seek(0)
    layer = torch.load(file, weights_only=False)
    assert isinstance(layer, LoraLinear)
    assert isinstance(layer.lora_dropout["default"], StatelessDropout)


def test_all_linear_takes_a_subclass_that_computes_as_one_and_no_router_of_experts():
    class Renamed(nn.Linear):
        pass

    class Router(nn.Linear):
        """As those of Phi-MoE and Llama 4."""

        def forward(self, x):
            return super().forward(x), x

    module = nn.ModuleDict({"up": nn.Linear(2, 3), "down": Renamed(3, 2), "router": Router(2, 2)})
    assert linear_names(module) == ["down", "up"]
