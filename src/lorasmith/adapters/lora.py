"""LoRA on a module, by peft: attach a new adapter, load one, and turn one into files."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers import PreTrainedModel

from lorasmith.adapters.check import adapter_weights, checked_adapter
from lorasmith.adapters.dropout import DropoutClock, use_stateless_dropout
from lorasmith.adapters.lora_linear import use_fast_linear
from lorasmith.adapters.mutated_init import as_plain_lora, moves_base_weights, plain_config
from lorasmith.config import LoraConfig
from lorasmith.errors import ConfigError, SetupError
from lorasmith.files.adapter_dir import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def attach_lora(
    module: PreTrainedModel,
    config: LoraConfig,
    *,
    family_targets: Sequence[str] | None,
    base_name: str,
    clock: DropoutClock,
) -> peft.PeftModel:
    """A PeftModel over `module` (which peft changes in place) with one trainable adapter, "default".

    The adapter's weights are fp32 whatever the base is, and its first values depend on `clock.seed` alone.
    Raises: ConfigError for targets that match nothing or that LoRA cannot adapt.
    """
    if config.init_from is not None:
        model = load_adapter(module, Path(config.init_from), trainable=True)
        _take_dropout(model, config)
    else:
        peft_config = peft_lora_config(module, config, family_targets=family_targets, base_name=base_name)
        with torch.random.fork_rng(devices=[]), quiet_peft():
            torch.manual_seed(clock.seed)
            model = _wrapped(module, peft_config)
    use_stateless_dropout(model, clock)
    return model


def _wrapped(module: PreTrainedModel, config: peft.LoraConfig) -> peft.PeftModel:
    """Raises: ConfigError for a target that peft has no LoRA for, such as Baichuan2's NormHead."""
    try:
        return peft.get_peft_model(module, config)
    except ValueError as error:
        raise ConfigError(
            "LoRA does not fit a target module",
            where="lora.target_modules",
            why=str(error).split(". ")[0],
            fix="leave it out; lora.modules_to_save trains a module in full",
        ) from error


def peft_lora_config(
    module: nn.Module, config: LoraConfig, *, family_targets: Sequence[str] | None, base_name: str
) -> peft.LoraConfig:
    """Our section as peft's, with explicit targets that are known to match. See `attach_lora`."""
    peft_config = peft.LoraConfig(
        r=config.r,
        lora_alpha=_whole(config.lora_alpha),
        lora_dropout=config.lora_dropout,
        target_modules=_explicit_targets(module, config, family_targets),
        modules_to_save=config.modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,
        base_model_name_or_path=base_name,
        task_type="CAUSAL_LM",
    )
    use_fast_linear(peft_config)
    moves_base_weights(config)
    _require_matches(module, peft_config)
    return peft_config


def load_adapter(module: PreTrainedModel, directory: Path, *, trainable: bool = False) -> peft.PeftModel:
    """The adapter of a PEFT directory over `module`.

    Raises: SetupError if files are missing, ask for what is refused, or do not fit this base; peft sees them
    only after that.
    """
    try:
        with quiet_peft():
            config = checked_adapter(module, directory)
            use_fast_linear(config)
            model = peft.PeftModel.from_pretrained(
                module, str(directory), is_trainable=trainable, config=config
            )
    except (ValueError, RuntimeError, KeyError, OSError, TypeError, SafetensorError) as error:
        raise SetupError(
            "the adapter does not fit this base model",
            where=str(directory),
            why=(str(error).strip() or type(error).__name__).splitlines()[0],
            fix="check that it was trained on this model (base_model_name_or_path in adapter_config.json)",
        ) from error
    return model if trainable else model.eval()


def read_adapter(module: nn.Module, directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT directory under their file names, on the CPU, without loading them into `module`.

    Raises: SetupError as `load_adapter`.
    """
    with quiet_peft():
        checked_adapter(module, directory)
    weights = adapter_weights(directory)
    if weights.name == ADAPTER_WEIGHTS:
        return load_file(weights)
    tensors: dict[str, torch.Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    return tensors


def adapter_tensors(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's file names."""
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def adapter_files(
    model: peft.PeftModel, initial: Mapping[str, torch.Tensor] | None = None
) -> dict[str, bytes]:
    """adapter_config.json and adapter_model.safetensors: the same adapter always gives the same bytes.

    `initial`: the adapter's first tensors, if its initialisation moved base weights (see mutated_init).
    """
    config = model.peft_config["default"]
    tree = {key: _plain(value) for key, value in config.to_dict().items()} | {"inference_mode": True}
    tensors = adapter_tensors(model)
    if initial is not None:
        tensors, tree = as_plain_lora(tensors, initial), tree | plain_config(config)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    text = json.dumps(dict(sorted(tree.items())), indent=2, ensure_ascii=False) + "\n"
    return {ADAPTER_CONFIG: text.encode(), ADAPTER_WEIGHTS: save(ready, metadata={"format": "pt"})}


def initial_tensors(model: peft.PeftModel, config: LoraConfig) -> dict[str, torch.Tensor] | None:
    """A copy of a fresh adapter, where its initialisation moved base weights into it; else None."""
    if config.init_from is not None or not moves_base_weights(config):
        return None
    return {name: tensor.detach().clone() for name, tensor in adapter_tensors(model).items()}


def restore_adapter(model: peft.PeftModel, directory: Path) -> None:
    """Put the tensors of a checkpoint back into an attached adapter."""
    result = set_peft_model_state_dict(model, load_file(directory / ADAPTER_WEIGHTS))
    assert not result.unexpected_keys, result.unexpected_keys


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _explicit_targets(
    module: nn.Module, config: LoraConfig, family_targets: Sequence[str] | None
) -> str | list[str]:
    targets = config.target_modules
    if targets == "auto" and family_targets is not None:
        return sorted(family_targets)
    if targets in ("auto", "all-linear"):
        return linear_names(module)
    return targets


def linear_names(module: nn.Module) -> list[str]:
    """Last names of the linear layers, without the head and without what only looks like one: routers of
    experts are nn.Linear too, and return tuples."""
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    names = {
        name.rpartition(".")[2]
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward and m is not head
    }
    return sorted(names)


def _require_matches(module: nn.Module, config: peft.LoraConfig) -> None:
    """Each wanted name, and a regex as a whole, must match a module; each saved module must exist."""
    names = [name for name, m in module.named_modules() if name]
    targets = config.target_modules
    wanted = [targets] if isinstance(targets, str) else sorted(targets or ())
    probes = [(t, peft.LoraConfig(target_modules=t if isinstance(targets, str) else [t])) for t in wanted]
    missing = [t for t, probe in probes if not any(check_target_module_exists(probe, name) for name in names)]
    missing += [
        m for m in config.modules_to_save or () if not any(n == m or n.endswith("." + m) for n in names)
    ]
    if missing:
        known = linear_names(module)
        near = [match for name in missing for match in difflib.get_close_matches(name, known, n=1)]
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ConfigError(
            f"no module of this model is called {', '.join(missing)}",
            where="lora.target_modules",
            fix=f"{hint}its linear layers are {', '.join(known)}",
        )


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without two warnings that no user can act on: a deprecated property that peft reads, and the base's
    name, which we know better than the module does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed.*")
        yield


def _take_dropout(model: peft.PeftModel, config: LoraConfig) -> None:
    """With init_from the adapter's own settings hold, except a dropout that the user states."""
    own = model.peft_config["default"]
    for field in ("r", "lora_alpha", "use_rslora", "use_dora"):
        stated = getattr(config, field)
        if field in config.model_fields_set and stated != getattr(own, field):
            raise ConfigError(
                f"lora.{field} is {stated} but the adapter has {getattr(own, field)}",
                where=str(config.init_from),
                fix=f"leave lora.{field} out: with lora.init_from the adapter's own value holds",
            )
    if "lora_dropout" in config.model_fields_set:
        own.lora_dropout = config.lora_dropout


def _whole(number: float) -> float:
    """32, not 32.0: other readers of adapter_config.json take integers only."""
    return int(number) if number.is_integer() else number


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value.value if hasattr(value, "value") else value
