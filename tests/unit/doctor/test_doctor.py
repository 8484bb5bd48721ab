"""Each check has a machine or a model that is fit, and one that is not; none of them ever raises."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_models import chat_model
from chat_texts import real_directory
from modules import KINDS, tiny_module
from packaging.requirements import Requirement as Declared
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner, Result

import lorasmith as ls
from lorasmith.cli.main import app
from lorasmith.doctor import adapter_files, chat, disk, machine, model_files, numerics, versions
from lorasmith.doctor.check import Check, guarded, worst
from lorasmith.doctor.examine import Request, examine
from lorasmith.errors import StorageError
from lorasmith.families import find_family
from lorasmith.testing.law import LawBroken
from lorasmith.testing.model_laws import packed_loss, step_rows

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of two shards."""
    directory = chat_model("generic", tmp_path_factory.mktemp("doctor") / "model")
    module = LlamaForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    module.save_pretrained(directory, max_shard_size="100KB")
    (directory / "generation_config.json").write_text("{}")
    return directory


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def only(name: str, checks: Iterator[Check]) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


# Versions


def test_the_ranges_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {Declared(text).name: Declared(text).specifier for text in project["dependencies"]}
    declared["pyarrow"] = Declared(project["optional-dependencies"]["parquet"][0]).specifier
    for wanted in versions.REQUIREMENTS:
        bounds = {bound.operator: bound.version for bound in declared[wanted.name]}
        assert (bounds[">="], bounds.get("<")) == (wanted.lowest, wanted.below), wanted.name


TORCH = versions.Requirement("torch", "2.9", "2.14", "2.10.0", "CVE-2026-24747")


@pytest.mark.parametrize(
    ("installed", "status", "said"),
    [
        ("2.13.0+cpu", "ok", "2.13.0+cpu"),
        ("2.10.0", "ok", "2.10.0"),
        ("2.9.1", "warn", "CVE-2026-24747, closed in 2.10.0"),
        ("2.5.1", "fail", "needs 2.9 or newer"),
        ("2.14.0", "warn", "only tested below 2.14"),
        (None, "fail", "not installed"),
    ],
)
def test_a_version_is_held_to_its_range_and_its_floor(installed: str | None, status: str, said: str) -> None:
    found = versions.version_check(TORCH, installed)
    assert found.status == status
    assert said in found.found
    assert found.remedy == ("" if status == "ok" else 'pip install "torch>=2.10.0,<2.14"')


def test_an_extra_need_not_be_there() -> None:
    assert versions.version_check(replace(TORCH, optional=True), None).status == "ok"


def test_an_old_python_is_told() -> None:
    assert versions.python_check("3.10.4").status == "fail"
    assert versions.python_check("3.11.0").status == "ok"


# Machine


@pytest.mark.parametrize(
    ("threads", "cores", "load", "status", "remedy"),
    [
        (4, 4, 0.3, "ok", ""),
        (4, 4, 3.1, "warn", "OMP_NUM_THREADS=1,"),
        (8, 4, 0.0, "warn", "OMP_NUM_THREADS=4"),
        (2, 1.5, 0.0, "warn", "OMP_NUM_THREADS=2"),
        (1, 4, 4.0, "ok", ""),
        (1, 4, 9.0, "warn", "let the other programs end"),
    ],
)
def test_threads_are_held_against_free_cores(
    threads: int, cores: float, load: float, status: str, remedy: str
) -> None:
    found = machine.threads_check(threads, cores, load)
    assert found.status == status
    assert remedy in found.remedy


def test_the_machine_is_described() -> None:
    assert machine.cpu_check().found
    assert 0 < machine.usable_cores() <= 4096
    assert [check.status for check in machine.gpu_checks()] != []
    assert "dtype auto is" in machine.product_check().found
    assert machine.product_rate(torch.float32, CPU, 64) > 0


# Disk


def test_a_disk_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    found = disk.write_check(tmp_path / "runs" / "mine")
    assert "MB/s with fsync" in found.found
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_told() -> None:
    with pytest.raises(StorageError):
        disk.write_check(Path("/proc/self/runs"))
    (found,) = guarded("disk writes", lambda: disk.write_check(Path("/proc/self/runs")))
    assert found.status == "fail"
    assert "cannot write" in found.found


def test_a_full_or_slow_disk_is_told() -> None:
    assert [disk.space_told(free, "x").status for free in (1e12, 1e9, 1e6)] == ["ok", "warn", "fail"]
    assert [disk.speed_told(rate, "x").status for rate in (1e9, 1e6)] == ["ok", "warn"]


# A model directory


def test_a_whole_model_is_fit(whole: Path, tmp_path: Path) -> None:
    checks = list(examine(Request(str(whole), output_dir=str(tmp_path), deep=True)))
    about_it = checks[[check.name for check in checks].index("family") :]
    assert [(c.name, c.found) for c in about_it if c.status != "ok"] == []
    names = [check.name for check in about_it if not check.name.startswith("sha256")]
    assert names == [
        *("family", "remote code", "weights", "tokenizer", "chat format", "embeddings"),
        *("adapter off = base", "packed = one by one", "micro-batch cuts", "checkpointing"),
    ]


def test_a_missing_shard_is_told(model: Path) -> None:
    gone = min(model.glob("model-*.safetensors"))
    gone.unlink()
    found = model_files.weights_check(model)
    assert (found.status, found.found) == ("fail", f"{gone.name} is missing")


def test_a_shard_cut_short_is_told(model: Path) -> None:
    shard = min(model.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    assert "its header says" in model_files.weights_check(model).found
    shard.write_bytes(b"\xff" * 64)
    assert model_files.weights_check(model).status == "fail"
    shard.write_bytes(b"x")
    assert "no readable header" in model_files.weights_check(model).found


def test_a_shard_of_another_download_is_told(model: Path) -> None:
    first, second, *_ = sorted(model.glob("model-*.safetensors"))
    shutil.copy(second, first)
    assert "tensors of the index" in model_files.weights_check(model).found


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../../etc/passwd"}}',
        f'{{"weight_map": {{"a": "{"好" * 86}"}}}}',
        "[",
    ],
    ids=["empty", "elsewhere", "a name of 258 bytes", "cut short"],
)
def test_an_index_that_is_none_is_told(model: Path, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    (found,) = guarded("weights", lambda: model_files.weights_check(model))
    assert found.status == "fail"


def test_no_weights_and_a_bad_bin_are_told(tmp_path: Path) -> None:
    assert "neither" in model_files.weights_check(tmp_path).found
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a zip")
    assert "no torch file" in model_files.weights_check(tmp_path).found
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert model_files.weights_check(tmp_path).status == "ok"


def test_a_hub_cache_names_its_files_by_their_hash(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "x"
    blob.parent.mkdir()
    save_file({"a": torch.ones(2)}, blob)
    name = model_files._sha256(blob)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for stored, status in ((name, "ok"), ("0" * 64, "fail")):
        link = snapshot / "model.safetensors"
        link.unlink(missing_ok=True)
        link.symlink_to(shutil.copy(blob, blob.parent / stored))
        assert [check.status for check in model_files.hash_checks(snapshot)] == [status]


def test_remote_code_is_named_and_ignored(model: Path) -> None:
    assert model_files.code_check(model).found == "none"
    edit(model / "config.json", auto_map={"AutoModel": "evil.Model"})
    (model / "evil.py").write_text("raise SystemExit")
    assert model_files.code_check(model).found == "ignored, never run: auto_map, evil.py"


def test_a_damaged_tokenizer_is_told(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    (found,) = guarded("tokenizer", lambda: chat.tokenizer_check(model, "auto", "official"))
    assert found.status == "fail"
    assert "tokenizer.json" in found.found


def test_a_tokenizer_that_transformers_damaged_is_told(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = real_directory(shared, tmp_path, "deepseek") / "tokenizer.json"
    fit = chat.tokenizer_check(tmp_path, "deepseek", "official")
    assert (fit.status, "known strings give the known ids" in fit.found) == ("ok", True)
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    definition = json.loads(path.read_text()) | {"pre_tokenizer": metaspace}
    path.unlink()
    path.write_text(json.dumps(definition))
    found = chat.tokenizer_check(tmp_path, "deepseek", "official")
    assert (found.status, "repaired" in found.found) == ("warn", True)


def test_a_stop_id_that_text_can_spell_is_told(model: Path) -> None:
    assert chat.chat_check(model, "auto", "official").status == "ok"
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    found = chat.chat_check(model, "auto", "official")
    assert (found.status, "stop ids (381, 2, 383)" in found.found) == ("warn", True)


@pytest.mark.parametrize(
    ("template", "status"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "fail"),
        ("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", "fail"),
        ("{% for m in messages %", "fail"),
        (
            "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "warn",
        ),
    ],
)
def test_a_wrong_template_is_told(model: Path, template: str, status: str) -> None:
    edit(model / "tokenizer_config.json", chat_template=template)
    (found,) = guarded("chat format", lambda: chat.chat_check(model, "auto", "official"))
    assert found.status == status


def test_ids_without_embeddings_are_told(model: Path) -> None:
    assert chat.embeddings_check(model, "auto", "official").status == "ok"
    edit(model / "config.json", vocab_size=100)
    found = chat.embeddings_check(model, "auto", "official")
    assert (found.status, "100 rows" in found.found) == ("fail", True)


def test_a_directory_of_no_family_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (found,) = guarded("family", lambda: model_files.family_check(tmp_path, "auto"))
    assert (found.status, found.found.split(";")[0]) == ("fail", "config.json fits no family")


# An adapter


@pytest.fixture(scope="module")
def trained(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train = ls.TrainConfig(max_steps=1, learning_rate=1e-2)
    ls.train(
        ls.load_module(str(whole), dtype="fp32"), numerics.random_examples(90), output_dir=run, train=train
    )
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def of_adapter(run: Path, base: Path | None) -> dict[str, Check]:
    checks = guarded("adapter", lambda: adapter_files.adapter_checks(run, base))
    return {check.name: check for check in checks}


def change_tensors(run: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(run / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, run / "adapter_model.safetensors")


def test_an_adapter_is_read_and_held_against_its_base(run: Path, whole: Path) -> None:
    found = of_adapter(run, whole)
    assert [check.status for check in found.values()] == ["ok", "ok"]
    assert "28 tensors on 14 modules fit model's config.json; 14 of" in found["adapter fit"].found
    path = run / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t * (0 if "lora_B" in n else 1) for n, t in tensors.items()}, path)
    assert "every B is zero" in of_adapter(run, whole)["adapter"].found
    save_file({n: t * float("nan") for n, t in tensors.items()}, path)
    assert "not finite" in of_adapter(run, whole)["adapter"].found
    path.write_bytes(b"x")
    assert [(c.name, c.status) for c in of_adapter(run, whole).values()] == [("adapter", "fail")]


A0 = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
MISFITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str, str]] = {
    "no pair": (lambda t: t.pop(A0), f"missing: {A0}", "lora_B.weight has no A.weight"),
    "rank": (lambda t: t.update({A0: t[A0][:3].clone()}), "(3, 64) instead of (8, 64)", "not multiply"),
    "name": (
        lambda t: t.update({"x.lora_A.weight": t[A0].clone()}),
        "unknown: x.lora_A",
        "x.lora_A.weight has no",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_an_adapter_that_does_not_fit_is_told_from_headers_alone(run: Path, whole: Path, kind: str) -> None:
    change, over_base, alone = MISFITS[kind]
    change_tensors(run, change)
    with_base, without = of_adapter(run, whole), of_adapter(run, None)
    assert with_base["adapter"].status == "fail"
    assert over_base in with_base["adapter"].found
    assert with_base["adapter"].remedy
    assert without["adapter fit"].status == "fail"
    assert alone in without["adapter fit"].found


def test_no_weight_of_the_base_is_read(run: Path, model: Path) -> None:
    """Only headers are left of the shards, and they still say whether it fits."""
    for shard in model.glob("*.safetensors"):
        data = shard.read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        shard.unlink()
        with shard.open("wb") as file:
            file.write(header)
            file.truncate(len(data))
    assert of_adapter(run, model)["adapter fit"].status == "ok"


def test_a_base_whose_files_contradict_its_config_is_told(run: Path, model: Path) -> None:
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        wide = {
            n: torch.zeros(len(t) * 2, t.shape[1])
            for n, t in tensors.items()
            if n.endswith("down_proj.weight")
        }
        save_file(tensors | wide, shard)
    found = of_adapter(run, model)["adapter fit"]
    assert (found.status, "(64, 64) in the base's files, (32, 64) by its config.json" in found.found) == (
        "fail",
        True,
    )


def test_an_absent_base_is_said(run: Path, tmp_path: Path) -> None:
    edit(run / "adapter_config.json", base_model_name_or_path="no/such-base")
    found = {check.name: check for check in examine(Request(str(run), output_dir=str(tmp_path)))}
    assert found["model"].status == "fail"
    assert found["adapter fit"].status == "warn"
    assert "no/such-base is not on this machine" in found["adapter fit"].found
    assert "--adapter" in found["adapter fit"].remedy
    assert found["adapter"].status == "ok"


def test_a_pickled_adapter_is_not_opened(run: Path, whole: Path) -> None:
    (run / "adapter_model.safetensors").unlink()
    (run / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    found = of_adapter(run, whole)["adapter"]
    assert (found.status, "nothing of it was read" in found.found) == ("warn", True)
    assert "safetensors" in found.remedy


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_however_it_is_taken(kind: str, dtype: torch.dtype) -> None:
    config = numerics.tiny_config(tiny_module(kind).config)
    targets = find_family({}, kind.removesuffix("-13b")).target_modules if kind == "baichuan2" else None
    subject = numerics.tiny_subject(config, targets, dtype, CPU)
    whole = packed_loss(subject.model, subject.clock, step_rows(subject.model, subject.rows))
    for name, other in numerics.other_ways(subject):
        found = numerics.told(name, numerics.agreement(whole, other), dtype)
        assert found.status == "ok", found
    assert numerics.adapter_off_check(config, targets, dtype, CPU).status == "ok"


def test_wrong_numbers_are_told() -> None:
    one = (2.0, {"a": torch.tensor([1.0, 0.0]), "b": torch.ones(2)})
    turned = (2.0, {"a": torch.tensor([1.0, 0.1]), "b": torch.ones(2)})
    other_loss = (2.1, one[1])
    wild = (float("nan"), one[1])
    assert numerics.told("x", numerics.agreement(one, one), torch.float32).status == "ok"
    for other in (turned, other_loss, wild):
        found = numerics.told("x", numerics.agreement(one, other), torch.float32)
        assert found.status == "fail"
        assert found.remedy
    assert numerics.agreement(one, turned).worst == "a"


# The whole


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("out\nof luck"), "RuntimeError: out of luck"),
        (LawBroken("a law", "a case"), "a law: a case"),
    ],
)
def test_a_check_that_raises_is_a_failed_check(error: Exception, said: str) -> None:
    def breaks() -> Iterator[Check]:
        yield Check("first", "ok", "fine")
        raise error

    assert [(c.name, c.status, c.found) for c in guarded("second", breaks)] == [
        ("first", "ok", "fine"),
        ("second", "fail", said),
    ]


def test_the_gravest_status_counts() -> None:
    assert worst([]) == "ok"
    assert worst([Check("a", "ok", ""), Check("b", "warn", "")]) == "warn"
    assert worst([Check("a", "warn", ""), Check("b", "fail", ""), Check("c", "ok", "")]) == "fail"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_the_verb_prints_a_line_for_each_check(tmp_path: Path) -> None:
    told = invoke("--output-dir", tmp_path)
    assert told.exit_code == 0
    lines = told.stdout.splitlines()
    assert {line.split()[0] for line in lines[:-1] if not line.startswith("  ")} <= {"ok", "warn"}
    assert lines[-1].endswith(" 0 fail")


def test_the_verb_prints_json_and_fails_on_a_broken_model(model: Path, tmp_path: Path) -> None:
    min(model.glob("model-*.safetensors")).unlink()
    (model / "tokenizer.json").write_text("{")
    told = invoke(model, "--json", "--output-dir", tmp_path)
    assert told.exit_code == 4
    rows = json.loads(told.stdout)
    assert {tuple(row) for row in rows} == {("name", "status", "found", "remedy")}
    failed = {row["name"] for row in rows if row["status"] == "fail"}
    assert failed == {"weights", "tokenizer", "chat format", "embeddings"}
    assert all(row["remedy"] for row in rows if row["status"] != "ok")


@pytest.mark.parametrize("model", ["no/such-model", "./nowhere", "a b c", "pyproject.toml"])
def test_a_model_that_is_not_here_is_one_failed_line(model: str, tmp_path: Path) -> None:
    checks = list(examine(Request(model, output_dir=str(tmp_path))))
    assert only("model", iter(checks)).status == "fail"
    assert worst([check for check in checks if check.name != "model"]) != "fail"
