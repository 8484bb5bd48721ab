"""TransNormerLLM against figures of the reference implementation, within the tolerances stated here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorasmith as ls
from lorasmith.runs.progress import SilentReporter

CASES = ("transnormer_1b", "transnormer_7b")
FP32, WITH_LORA, TRAINED = 2e-4, 4e-4, 2e-5
LOSS = 1e-5
TRAIN = {
    "num_epochs": 1,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "warmup_ratio": 0.0,
    "max_grad_norm": None,
    "weight_decay": 0.0,
    "shuffle": False,
    "logging_steps": 1,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared: Path) -> Path:
    directory = shared / "golden/models" / request.param
    assert directory.is_dir()
    return directory


@pytest.fixture
def module(case: Path) -> Any:
    return ls.load_module(str(case), dtype="fp32")


def close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)


def read(case: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    inputs = load_file(case / "inputs.safetensors")
    return inputs, load_file(case / "expected.safetensors"), inputs["attention_mask"].bool()


def left_padded(inputs: dict[str, Tensor], name: str) -> Tensor:
    lengths = inputs["attention_mask"].sum(1).tolist()
    return torch.stack([row.roll(-n) for row, n in zip(inputs[name], lengths, strict=True)])


def test_hidden_states_logits_loss_and_gradients(case: Path, module: Any) -> None:
    inputs, expected, mask = read(case)
    states = {}
    for number, layer in enumerate(module.model.layers):
        layer.register_forward_hook(lambda _, __, out, n=number: states.update({f"hidden.block.{n}": out}))
    outputs = module(**inputs, output_hidden_states=True)
    states |= {"hidden.embed": outputs.hidden_states[0], "hidden.final_norm": outputs.hidden_states[-1]}
    states["hidden.embed"].retain_grad()
    assert set(states) == {name for name in expected if name.startswith("hidden.")}
    for name, state in states.items():
        close(state[mask], expected[name][mask], FP32)
    close(outputs.logits[mask], expected["logits"][mask], FP32)
    close(outputs.loss, expected["loss"], LOSS)

    outputs.loss.backward()
    close(states["hidden.embed"].grad[mask], expected["grad.hidden.embed"][mask], FP32)
    weights = [name.removeprefix("grad.") for name in expected if name.startswith("grad.model")]
    assert "model.layers.0.token_mixer.lrpe.theta" in weights
    for name in weights:
        close(module.get_parameter(name).grad, expected[f"grad.{name}"], FP32)


@torch.no_grad()
def test_left_padding(case: Path, module: Any) -> None:
    inputs, expected, _ = read(case)
    ids, mask = left_padded(inputs, "input_ids"), left_padded(inputs, "attention_mask")
    without_positions = module(input_ids=ids, attention_mask=mask).logits
    close(without_positions[mask.bool()], expected["logits_left"][mask.bool()], FP32)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    counted = module(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    close(counted[mask.bool()], expected["logits_left"][mask.bool()], FP32)


@torch.no_grad()
def test_a_long_row_over_many_chunks(case: Path, module: Any) -> None:
    _, expected, _ = read(case)
    ids = expected["long.input_ids"]
    logits = module(input_ids=ids).logits
    close(logits[:, 252:260], expected["long.logits_252_260"], FP32)
    close(logits[:, -8:], expected["long.logits_last8"], FP32)
    prompt = module(input_ids=ids[:, :201], use_cache=True)
    rest = module(input_ids=ids[:, 201:], past_key_values=prompt.past_key_values)
    close(rest.logits[:, -8:], expected["long.logits_last8"], FP32)


def test_greedy_decoding_alone_and_as_a_left_padded_batch(case: Path, module: Any) -> None:
    inputs, expected, _ = read(case)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        ids = inputs["input_ids"][row : row + 1, :length]
        told = {"output_logits": True, "return_dict_in_generate": True}
        result = module.generate(ids, attention_mask=torch.ones_like(ids), **settings, **told)
        assert result.sequences[0, length:].tolist() == expected["greedy.tokens"][row].tolist()
        close(torch.cat(result.logits), expected["greedy.logits"][row], FP32)
    ids, mask = left_padded(inputs, "input_ids"), left_padded(inputs, "attention_mask")
    batch = module.generate(ids, attention_mask=mask, **settings)
    assert batch[:, ids.shape[1] :].tolist() == expected["greedy.tokens"].tolist()


def test_an_adapter_of_stock_peft(case: Path) -> None:
    inputs, _, mask = read(case)
    expected = load_file(case / "lora/expected.safetensors")
    model = ls.load_module(str(case), dtype="fp32", adapter=str(case / "lora"))
    names = [name.removeprefix("grad.") for name in expected if name.startswith("grad.")]
    parameters = {name: model.get_parameter(name.replace(".weight", ".default.weight")) for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_()
    outputs = model(**inputs)
    close(outputs.logits[mask], expected["logits_adapter"][mask], WITH_LORA)
    close(outputs.loss, expected["loss_adapter"], LOSS)
    outputs.loss.backward()
    assert len(parameters) == 4
    for name, parameter in parameters.items():
        close(parameter.grad, expected[f"grad.{name}"], FP32)

    merged = model.merge_and_unload()
    with torch.no_grad():
        close(merged(**inputs).logits[mask], expected["logits_merged"][mask], WITH_LORA)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        ids = inputs["input_ids"][row : row + 1, :length]
        new = merged.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert new[0, length:].tolist() == expected["greedy_merged.tokens"][row].tolist()


def start_of(case: Path, directory: Path) -> Path:
    """The adapter that the reference trajectory starts from: its A, and B = 0."""
    directory.mkdir()
    weights = load_file(case / "lora/adapter_model.safetensors")
    zeroed = {name: x * 0 if "lora_B" in name else x for name, x in weights.items()}
    save_file(zeroed, directory / "adapter_model.safetensors")
    config = (case / "lora/adapter_config.json").read_bytes()
    (directory / "adapter_config.json").write_bytes(config)
    return directory


def steps_of(case: Path) -> tuple[list[ls.Example], int]:
    batches = load_file(case / "train/batches.safetensors")
    lengths = batches["attention_mask"].sum(-1).flatten().tolist()
    rows = zip(batches["input_ids"].flatten(0, 1), batches["labels"].flatten(0, 1), lengths, strict=True)
    examples = [ls.Example(ids[: n - 1].numpy(), labels[1:n].numpy()) for ids, labels, n in rows]
    return examples, batches["input_ids"].shape[1]


@pytest.mark.parametrize("max_tokens", [8192, 30])
def test_six_training_steps(case: Path, tmp_path: Path, max_tokens: int) -> None:
    expected = json.loads((case / "train/trajectory.json").read_text())["steps"]
    examples, batch_size = steps_of(case)
    ls.train(
        ls.load_module(str(case), dtype="fp32"),
        examples,
        output_dir=tmp_path / "run",
        lora=ls.LoraConfig(init_from=str(start_of(case, tmp_path / "init"))),
        train=ls.TrainConfig(batch_size=batch_size, max_tokens=max_tokens, **TRAIN),
        reporter=SilentReporter(),
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("loss") is not None]
    assert [step["loss"] for step in steps] == pytest.approx([s["loss"] for s in expected], abs=TRAINED)
    assert [s["grad_norm"] for s in steps] == pytest.approx([s["grad_norm"] for s in expected], rel=TRAINED)
    final = load_file(case / "train/final_adapter/adapter_model.safetensors")
    ours = load_file(tmp_path / "run/adapter_model.safetensors")
    assert set(ours) == set(final)
    for name, weight in final.items():
        close(ours[name], weight, TRAINED)
