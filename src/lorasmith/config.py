"""Every knob, declared once: YAML keys, `--set`, the Python API and docs/reference/config.md come from here.

Config objects are inert and frozen: they build nothing and never change. An unknown key is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorasmith.errors import ConfigError
from lorasmith.json_file import read_regular
from lorasmith.redaction import tree_without_secrets

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
MergeLayout = Literal["original", "native"]
AdapterForm = Literal["split", "fused"]
DataFormat = Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, defer_build=True
    )


class ModelConfig(Section):
    """The base model."""

    path: str = Field("", description="Directory of the base model, or its name on the hub.")
    family: str = Field(
        "auto", description="Family name as `lorasmith families` lists it; auto reads config.json."
    )
    chat_format: Literal["official", "tutorial"] = Field(
        "official", description="The authors' own chat format, or what the family's tutorial feeds."
    )
    dtype: Dtype = Field(
        "auto", description="auto: bf16 where a probe finds it fast, else fp32 (fp16 on old GPUs)."
    )
    device: str = Field(
        "auto", description="auto: cuda where there is one, else cpu; or cpu, cuda, cuda:1, mps."
    )
    hub: Literal["huggingface", "modelscope"] = Field(
        "huggingface", description="Where a hub name is looked up."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub name.")


class DataConfig(Section):
    """The training rows."""

    train: str = Field(
        "", description="File (.json, .jsonl, .csv, .parquet, also .gz) or a hub data set name."
    )
    eval: Annotated[float, Field(ge=0, lt=1)] | str | None = Field(
        None, description="Held-out rows: a share (split by hash of the prompt), or a file of their own."
    )
    format: DataFormat = Field("auto", description="Row format; auto detects it and says which it took.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our field: your column, e.g. {instruction: question, output: reply}.",
    )
    system: str | None = Field(
        None, description="System prompt of every conversation that has none of its own."
    )
    input_separator: str = Field(
        "", description="Stands between `instruction` and `input`; the tutorials join them with nothing."
    )
    max_length: PositiveInt | None = Field(
        None, description="Longest conversation in tokens; null: the model's own limit."
    )
    over_length: Literal["error", "drop", "truncate"] = Field(
        "error", description="What happens to longer conversations; drop and truncate are counted and named."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="skip writes the bad rows to rejects.jsonl and goes on with the others."
    )
    cache: bool = Field(
        True, description="Keep the encoded rows in the user's cache directory ($LORASMITH_CACHE moves it)."
    )


class LoraConfig(Section):
    """The adapter, in PEFT's words."""

    r: Annotated[int, Field(gt=0, le=4096)] = Field(8, description="Rank.")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(
        32, description="The adapter is scaled by lora_alpha / r."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Dropout on the adapter's input."
    )
    target_modules: str | list[str] = Field(
        "auto", description="auto (the family's own list), all-linear, a list of module names, or one regex."
    )
    modules_to_save: list[str] | None = Field(None, description="Modules trained in full beside the adapter.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) (arXiv:2312.03732).")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA (arXiv:2402.09353).")
    init_lora_weights: bool | str = Field(
        True,
        description="true, gaussian or orthogonal; what rewrites the base (pissa, olora, ...) is refused.",
    )
    init_from: str | None = Field(
        None, description="Go on from this adapter directory; its r, alpha and targets hold."
    )


class TrainConfig(Section):
    """The training run."""

    output_dir: str = Field("", description="Run directory; it is itself a PEFT adapter directory.")
    batch_size: PositiveInt = Field(16, description="Conversations per optimizer step, over all processes.")
    max_tokens: PositiveInt = Field(
        4096, description="Tokens per forward pass: memory only, never the result."
    )
    static_rows: bool = Field(
        False, description="On a GPU pad every row to max_tokens: one shape, more work; see docs/gpu.md."
    )
    share_prefixes: bool = Field(
        True, description="Compute what conversations of a step have in common once; false: for each."
    )
    learning_rate: Annotated[float, Field(ge=0)] = Field(1e-4, description="Peak learning rate.")
    num_epochs: PositiveInt = Field(3, description="Passes over the rows.")
    max_steps: PositiveInt | None = Field(None, description="Stop after this many optimizer steps.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape after the warm-up."
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.03, description="Share of the steps spent warming up."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="Clip the gradient's norm; null: never."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's decoupled weight decay.")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="AdamW's first moment.")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="AdamW's second moment.")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon.")
    activation_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="Recompute activations: less memory, a third more work. auto: as few layers as needed.",
    )
    fp8_base: bool = Field(
        False, description="The frozen base multiplies in fp8 while it trains (Ada, Hopper and later)."
    )
    max_skipped_steps: PositiveInt = Field(
        3, description="Stop after this many steps in a row whose loss or gradient is not finite."
    )
    shuffle: bool = Field(True, description="A new order each epoch, a pure function of the seed.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Order, initial adapter and dropout masks."
    )
    logging_steps: PositiveInt = Field(10, description="Steps between lines of metrics.jsonl.")
    save_steps: PositiveInt = Field(100, description="Steps between checkpoints.")
    save_total_limit: PositiveInt | None = Field(
        None, description="Keep the newest n checkpoints (and the best)."
    )
    eval_steps: PositiveInt | None = Field(
        None, description="Steps between evaluations; null: start and end only."
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after this many evaluations without a better held-out loss."
    )
    final_adapter: Literal["last", "best"] = Field(
        "last", description="Which adapter the run directory ends with."
    )
    golden_rows: NonNegativeInt = Field(
        2,
        description="Training prompts that golden.json keeps for `verify`; 0: none, where rows are private.",
    )

    @model_validator(mode="after")
    def _evaluations_exist(self) -> TrainConfig:
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early_stopping_patience counts evaluations: set eval_steps too")
        return self


class GenerateConfig(Section):
    """How answers are sampled."""

    max_new_tokens: PositiveInt = Field(512, description="Longest answer in tokens.")
    greedy: bool = Field(False, description="Always the likeliest token; the sampling knobs are then off.")
    temperature: Annotated[float, Field(gt=0)] = Field(
        0.7, description="Below 1 is surer, above 1 is wilder."
    )
    top_k: NonNegativeInt = Field(50, description="Sample among the k likeliest tokens; 0: all.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Sample among the likeliest p of the mass."
    )
    repetition_penalty: Annotated[float, Field(gt=0)] = Field(1.0, description="Above 1 discourages repeats.")
    no_repeat_ngram_size: NonNegativeInt = Field(0, description="No n-gram of this size twice; 0: off.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(None, description="Makes sampling repeatable.")


class RunConfig(Section):
    """One training run: the four sections of a recipe."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig())
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())


AnySection = TypeVar("AnySection", bound=Section)
_LARGEST_YAML = 2**16
_DEEPEST = 20
"""Bytes, and collections within each other: far above any recipe, and read in a moment."""


def load_run_config(path: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """Read a recipe and lay `overrides` ({"train.learning_rate": 2e-4}) over it.

    Raises: ConfigError naming the file and the key; an unknown key comes with the nearest known one.
    """
    tree = read_yaml(path) if path else {}
    for dotted, value in overrides.items():
        _set_dotted(tree, dotted, value)
    said = [str(path)] if path else []
    return validate(
        RunConfig, tree, where=" with ".join([*said, *(["flags"] if overrides else [])]) or "flags"
    )


def parse_override(text: str) -> tuple[str, Any]:
    """`train.learning_rate=2e-4` -> ("train.learning_rate", 0.0002); the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"--set {text!r} is not KEY=VALUE", fix="write it like --set train.learning_rate=2e-4"
        )
    return key.strip(), _parse_yaml(value, where=f"--set {key.strip()}")


def validate(section: type[AnySection], tree: Any, *, where: str) -> AnySection:
    """A checked, frozen section. Raises: ConfigError with one line per wrong key."""
    if not isinstance(tree, Mapping):
        raise ConfigError(
            "a config is a mapping of keys to values", where=where, why=f"found {type(tree).__name__}"
        )
    try:
        return section.model_validate(dict(tree))
    except ValidationError as error:
        lines = [_describe(section, item) for item in error.errors()]
        raise ConfigError(
            "\n".join(lines), where=where, fix="docs/reference/config.md lists every key"
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read safely: no tags, no aliases, no key twice, and 1e-4 is a number."""
    try:
        text = read_regular(path, _LARGEST_YAML).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}", fix="check the path") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}", why=str(error), fix="name a YAML file of settings") from None
    tree = _parse_yaml(text, where=str(path))
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(
            "a config is a mapping of keys to values", where=str(path), why=f"found {type(tree).__name__}"
        )
    return tree or {}


def to_yaml(section: Section) -> str:
    """What `read_yaml` reads; tokens and passwords are masked."""
    tree = tree_without_secrets(section.model_dump())
    text: str = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
    return text


def _parse_yaml(text: str, *, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError("this is not YAML that we read", where=place, why=problem) from None
    except ValueError as error:  # of a date or a number that is none
        raise ConfigError("this is not YAML that we read", where=where, why=str(error)) from None


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, less its traps: aliases, duplicate keys, and `1e-4` as a string."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            problem = "aliases (*name) are not allowed"
            raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)
        if (
            getattr(event, "tag", None) is not None
        ):  # the loader's own end in errors of any kind: !!timestamp x
            problem = "tags (!!name) are not allowed"
            raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)
        if self._depth == _DEEPEST:
            raise yaml.constructor.ConstructorError(None, None, "it is nested too deep", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level == _DEEPEST:  # the scanner runs ahead of `compose_node`, in quadratic time
            raise yaml.scanner.ScannerError(None, None, "it is nested too deep", self.get_mark())
        super().fetch_flow_collection_start(token)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{dotted}: {parent} is a value, not a section")
        tree = below
    tree[leaf] = value


def _describe(section: type[Section], item: Any) -> str:
    """One pydantic error as a line of ours: the dotted key, the rule, the value that broke it."""
    names: Sequence[str] = [
        str(part) for part in item["loc"] if not str(part).startswith(("constrained-", "function-"))
    ]
    dotted = ".".join(names)
    if item["type"] == "extra_forbidden":
        return f"unknown key {dotted}{_hint(section, names)}"
    message: str = item["msg"].removeprefix("Value error, ")
    if not dotted or item["type"] == "value_error":
        return f"{dotted}: {message}".removeprefix(": ")
    return f"{dotted}: {message[0].lower()}{message[1:]} (got {item['input']!r})"


def _hint(section: type[Section], names: Sequence[str]) -> str:
    """The nearest known key, also one that stands in another section."""
    known = _keys(section, names[:-1])
    near = difflib.get_close_matches(names[-1], known, n=1)
    below = [f"{name}.{names[-1]}" for name in section.model_fields if names[-1] in _keys(section, [name])]
    if near or below:
        return f"; did you mean {[*near, *below][0]!r}?"
    return f"; known: {', '.join(known)}"


def _keys(section: type[Section], path: Sequence[str]) -> list[str]:
    for name in path:
        field = section.model_fields.get(name)
        if (
            field is None
            or not isinstance(field.annotation, type)
            or not issubclass(field.annotation, Section)
        ):
            return []
        section = field.annotation
    return list(section.model_fields)
