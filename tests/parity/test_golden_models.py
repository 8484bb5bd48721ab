"""The numbers of the reference implementations, case by case, in fp32, within the tolerances of their README.

Shapes: B = rows, T = tokens with padding, N = new tokens, V = vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.model.packed import base_module
from lorasmith.runs.progress import SilentReporter

CASES = (
    *("baichuan2_7b_a", "baichuan2_7b_b", "baichuan2_13b_alibi", "chatglm3_a", "chatglm3_b"),
    *("llama3_a", "llama3_b", "deepseek_a", "deepseek_b"),
)
LOGITS = 5e-5
LOSS = GRADIENT = 1e-5
TRAJECTORY = 2e-5


class Golden:
    """One case: its directory and tensors; `real_BT` is False at padding, where nothing is compared."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.inputs = load_file(directory / "inputs.safetensors")
        self.expected = load_file(directory / "expected.safetensors")
        self.of_lora = load_file(directory / "lora/expected.safetensors")
        self.real_BT = self.inputs["attention_mask"].bool()

    def module(self, adapter: bool = False) -> nn.Module:
        lora = str(self.directory / "lora") if adapter else None
        return ls.load_module(str(self.directory), dtype="fp32", adapter=lora).eval()

    def prompts(self) -> list[Tensor]:
        return [ids[real][None] for ids, real in zip(self.inputs["input_ids"], self.real_BT, strict=True)]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared: Path) -> Golden:
    return Golden(shared / "golden/models" / request.param)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def greedy(module: nn.Module, prompt: Tensor, count: int, **more: Any) -> Any:
    knobs = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "min_new_tokens": count}
    more.setdefault("attention_mask", torch.ones_like(prompt))
    return module.generate(prompt, max_new_tokens=count, **knobs, **more)


def left_padded(case: Golden) -> tuple[Tensor, Tensor]:
    """The same rows with their padding in front."""
    real_BT = case.real_BT.flip(1)
    ids_BT = torch.full_like(case.inputs["input_ids"], json_of(case, "meta.json")["pad_id_used"])
    ids_BT[real_BT] = case.inputs["input_ids"][case.real_BT]
    return ids_BT, real_BT


def json_of(case: Golden, name: str) -> Any:
    return json.loads((case.directory / name).read_text())


def record(module: nn.Module) -> dict[str, Tensor]:
    """Filled by the next forward pass with the names of the golden hidden states."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name == "hidden.block.0":
                seen["hidden.embed"] = inputs[0]
                inputs[0].retain_grad()
            seen[name] = output

        return hook

    trunk = base_module(module).model
    for index, layer in enumerate(trunk.layers):
        layer.register_forward_hook(keep(f"hidden.block.{index}"))
    trunk.norm.register_forward_hook(keep("hidden.final_norm"))
    return seen


def test_logits_hidden_states_loss_and_gradients(case: Golden) -> None:
    module = case.module()
    seen = record(module)
    out = module(**case.inputs)
    out.loss.backward()
    close(out.logits[case.real_BT], case.expected["logits"][case.real_BT], LOGITS)
    close(out.loss, case.expected["loss"], LOSS)
    for name in (n for n in case.expected if n.startswith("hidden.")):
        close(seen[name][case.real_BT], case.expected[name][case.real_BT], LOGITS)
    gradients = {f"grad.{name}": p.grad for name, p in module.named_parameters()}
    gradients["grad.hidden.embed"] = seen["hidden.embed"].grad
    compared = [name for name in case.expected if name.startswith("grad.")]
    assert len(compared) >= 3
    for name in compared:
        close(gradients[name], case.expected[name], GRADIENT)


def test_left_padding(case: Golden) -> None:
    ids_BT, real_BT = left_padded(case)
    with torch.no_grad():
        logits = case.module()(input_ids=ids_BT, attention_mask=real_BT.long()).logits
    close(logits[real_BT], case.expected["logits_left"][real_BT], LOGITS)


def test_twelve_greedy_tokens_with_cache_alone_and_in_a_left_padded_batch(case: Golden) -> None:
    module = case.module()
    for row, prompt in enumerate(case.prompts()):
        out = greedy(module, prompt, 12, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(out.sequences[0, prompt.shape[1] :], case.expected["greedy.tokens"][row])
        close(torch.stack(out.logits, dim=1)[0].float(), case.expected["greedy.logits"][row], LOGITS)
    ids_BT, real_BT = left_padded(case)
    together = greedy(module, ids_BT, 12, attention_mask=real_BT.long())
    assert torch.equal(together[:, ids_BT.shape[1] :], case.expected["greedy.tokens"])


def test_the_adapter_of_the_old_peft_and_its_merge(case: Golden) -> None:
    module = case.module(adapter=True)
    mask = {"attention_mask": case.inputs["attention_mask"]}
    with torch.no_grad():
        logits = module(input_ids=case.inputs["input_ids"], **mask).logits
        close(logits[case.real_BT], case.of_lora["logits_adapter"][case.real_BT], LOGITS)
        merged = module.merge_and_unload()
        logits = merged(input_ids=case.inputs["input_ids"], **mask).logits
        close(logits[case.real_BT], case.of_lora["logits_merged"][case.real_BT], LOGITS)
    for row, prompt in enumerate(case.prompts()):
        new = greedy(merged, prompt, 6)[0, prompt.shape[1] :]
        assert torch.equal(new, case.of_lora["greedy_merged.tokens"][row])


def test_the_adapter_s_loss_and_gradients(case: Golden) -> None:
    module = case.module(adapter=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
    loss = module(**case.inputs).loss
    loss.backward()
    close(loss, case.of_lora["loss_adapter"], LOSS)
    gradients = {name.replace(".default", ""): p.grad for name, p in module.named_parameters()}
    compared = [name for name in case.of_lora if name.startswith("grad.")]
    assert len(compared) == 4
    for name in compared:
        close(gradients[name.removeprefix("grad.")], case.of_lora[name], GRADIENT)


def test_six_steps_of_training_through_the_front_door(case: Golden, tmp_path: Path) -> None:
    batches = load_file(case.directory / "train/batches.safetensors")
    golden, module = json_of(case, "train/trajectory.json"), case.module()
    train = ls.TrainConfig(
        batch_size=batches["input_ids"].shape[1],
        num_epochs=1,
        learning_rate=1e-3,
        lr_scheduler="constant",
        warmup_ratio=0.0,
        max_grad_norm=None,
        shuffle=False,
        logging_steps=1,
    )
    lora, rows = (
        ls.LoraConfig(init_from=str(zeroed_adapter(case, tmp_path / "init"))),
        steps_as_examples(batches),
    )
    ls.train(module, rows, output_dir=tmp_path / "run", lora=lora, train=train, reporter=SilentReporter())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if line.get("loss") is not None]
    for key in ("loss", "grad_norm"):
        want = [step[key] for step in golden["steps"]]
        relative = TRAJECTORY if key == "grad_norm" else 0
        assert [line[key] for line in told] == pytest.approx(want, abs=TRAJECTORY, rel=relative)
    ours = load_file(tmp_path / "run/adapter_model.safetensors")
    theirs = load_file(case.directory / "train/final_adapter/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        close(ours[name], tensor, TRAJECTORY)


def zeroed_adapter(case: Golden, directory: Path) -> Path:
    """The case's adapter as training began: every B zero."""
    directory.mkdir()
    tensors = load_file(case.directory / "lora/adapter_model.safetensors")
    start = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}
    save_file(start, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_bytes(
        (case.directory / "lora/adapter_config.json").read_bytes()
    )
    return directory


def steps_as_examples(batches: dict[str, Tensor]) -> list[ls.Example]:
    """Rows (steps, B, T) one by one, without padding, with labels at the position that predicts them."""
    rows = zip(
        *(batches[name].flatten(0, 1) for name in ("input_ids", "labels", "attention_mask")), strict=True
    )
    examples = []
    for index, (ids, labels, mask) in enumerate(rows):
        length = int(mask.sum())
        examples.append(
            ls.Example(ids[: length - 1].numpy(), labels[1:length].numpy(), f"batches:{index + 1}")
        )
    return examples
