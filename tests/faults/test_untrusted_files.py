"""Whatever bytes arrive, a reader reads them or says in an error of ours why not: at once, in bounded memory,
and without a look at any other file (reliability table, rows 6, 30, 31, 32 and 34)."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from untrusted_files import (
    READERS,
    SLOW_READERS,
    files_for,
    furnish,
    good_files,
    nothing_outside,
    reads_or_refuses,
    tensor_files,
)

from lorasmith.errors import SetupError
from lorasmith.files.tensor_header import LARGEST_HEADER, read_header
from lorasmith.json_file import parse_object

_MOST_GROWTH = 512 * 2**20
"""Bytes of resident memory over all cases of this file."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < _MOST_GROWTH


def try_many(place: Path, name: str, count: int) -> Counter[str]:
    """How often each end came."""
    reader, ends = (READERS | SLOW_READERS)[name], Counter[str]()
    path = place / reader.file

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(content=files_for(reader))
    def one(content: bytes) -> None:
        path.write_bytes(content)
        with nothing_outside(place):
            ends[reads_or_refuses(lambda: reader.read(place))] += 1

    try:
        one()
    finally:
        path.write_bytes(good_files()[reader.file])
    return ends


@pytest.mark.parametrize("name", READERS | SLOW_READERS)
def test_a_good_file_is_read(place: Path, name: str) -> None:
    """Else the trials below would prove nothing. The bases that are named are not here."""
    wanted = {"SetupError"} if name in ("adapter's base", "chat settings") else {"read"}
    assert {reads_or_refuses(lambda: (READERS | SLOW_READERS)[name].read(place), seconds=5)} == wanted


@pytest.mark.parametrize("name", READERS)
def test_dozens_of_files_for_each_reader(place: Path, name: str) -> None:
    ends = try_many(place, name, 40)
    assert sum(ends.values()) >= 40


def to_pipe(path: Path) -> None:
    os.mkfifo(path)


def to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def to_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**36)  # a hole that takes no disk


IRREGULAR = {"a pipe": to_pipe, "a device": to_device, "a directory": Path.mkdir, "a large file": to_large}


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_or_none_of_that_size_is_refused_at_once(place: Path, name: str, kind: str) -> None:
    reader = READERS[name]
    path = place / reader.file
    path.unlink()
    IRREGULAR[kind](path)
    try:
        assert reads_or_refuses(lambda: reader.read(place)) != "read" or name in TELL_IN_WORDS
    finally:
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(good_files()[reader.file])


TELL_IN_WORDS = {"shard", "manifest", "state"}
"""Readers that give a finding, and raise nothing."""


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_thousand_files_for_each_reader(place: Path, name: str) -> None:
    ends = try_many(place, name, 1000)
    assert sum(ends.values()) >= 1000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SLOW_READERS)
def test_hundreds_of_files_for_what_libraries_read(place: Path, name: str) -> None:
    ends = try_many(place, name, 300)
    assert sum(ends.values()) >= 300


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(content=tensor_files())
def test_what_we_read_of_a_header_the_library_reads_too(place: Path, content: bytes) -> None:
    path = place / "differential.safetensors"
    path.write_bytes(content)
    try:
        ours = {name: tensor.shape for name, tensor in read_header(path).items()}
    except SetupError:
        return
    with safe_open(path, framework="pt") as file:
        assert ours == {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_the_harness_finds_an_error_that_is_not_ours_a_slow_reader_and_a_look_elsewhere(place: Path) -> None:
    """Negative controls."""
    with pytest.raises(KeyError):
        reads_or_refuses(lambda: {}["a"])
    with pytest.raises(AssertionError, match="it took"):
        reads_or_refuses(lambda: sum(range(10**6)), seconds=1e-6)
    with pytest.raises(AssertionError, match="passwd"), nothing_outside(place):
        Path("/etc/passwd").read_bytes()


# The header's own corpus

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def header(tree: Any, data: bytes = b"\x00" * 8, *, length: int | None = None) -> bytes:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def two(first: list[int], second: list[int]) -> dict[str, Any]:
    spans = {"a": first, "b": second}
    return {
        name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for name, (start, end) in spans.items()
    }


BROKEN = {
    "empty file": b"",
    "seven bytes": b"\x00" * 7,
    "only a length": struct.pack("<Q", 0),
    "cut in the header": header({"a": ONE})[:30],
    "cut in the data": header({"a": ONE})[:-1],
    "trailing bytes": header({"a": ONE}) + b"\x00",
    "no tensors, but data": header({}, b"1234"),
    "a huge length": header({"a": ONE}, length=2**63),
    "the largest length": header({"a": ONE}, length=2**64 - 1),
    "a length into the data": header({"a": ONE}, length=len(json.dumps({"a": ONE})) + 4),
    "overlap": header(two([0, 6], [4, 8])),
    "the same bytes twice": header(two([0, 8], [0, 8])),
    "a gap": header(two([0, 2], [4, 8])),
    "a gap in front": header(two([2, 4], [4, 8])),
    "beyond the file": header(two([0, 4], [4, 2**40])),
    "negative": header({"a": {**ONE, "data_offsets": [-8, 0]}}),
    "end before start": header({"a": {**ONE, "data_offsets": [8, 0]}}),
    "offsets of text": header({"a": {**ONE, "data_offsets": ["0", "8"]}}),
    "offsets of floats": header({"a": {**ONE, "data_offsets": [0.0, 8.0]}}),
    "offsets of bools": header({"a": {"dtype": "U8", "shape": [], "data_offsets": [False, True]}}, b"1"),
    "three offsets": header({"a": {**ONE, "data_offsets": [0, 8, 8]}}),
    "huge offsets": header({"a": {**ONE, "data_offsets": [10**400, 10**400 + 8]}}),
    "unknown dtype": header({"a": {**ONE, "dtype": "F1024"}}),
    "dtype of another kind": header({"a": {**ONE, "dtype": 5}}),
    "dtype of another width": header({"a": {**ONE, "dtype": "F16"}}),
    "shape of another size": header({"a": {**ONE, "shape": [3]}}),
    "negative shape": header({"a": {**ONE, "shape": [-1, -2]}}),
    "huge shape": header({"a": {**ONE, "shape": [2**62, 2**62, 2]}}),
    "shape that wraps around": header({"a": {**ONE, "shape": [2**61 + 2**60, 8, 2]}}),
    "a million axes": header({"a": {**ONE, "shape": [1] * 10**6}}),
    "shape that is a table": header({"a": {**ONE, "shape": {"0": 2}}}),
    "nested": header({"a": {"b": ONE}}),
    "an entry too many": header({"a": {**ONE, "code": "os.system"}}),
    "an entry too few": header({"a": {"dtype": "F32", "shape": [2]}}),
    "no table": header([ONE]),
    "a key twice": header(b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}"),
    "an entry's key twice": header(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "not UTF-8": header(b'{"\xff\xfe":' + json.dumps(ONE).encode() + b"}"),
    "half a character": header(b'{"\\ud800":' + json.dumps(ONE).encode() + b"}"),
    "UTF-16": header(json.dumps({"a": ONE}).encode("utf-16")),
    "NaN": header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "deep": header(b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
    "metadata that is no table": header({"__metadata__": [1], "a": ONE}),
    "metadata of numbers": header({"__metadata__": {"a": 1}, "a": ONE}),
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.",
    "a zip": b"PK\x03\x04" + b"\x00" * 60,
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_header_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(BROKEN[kind])
    with nothing_outside(tmp_path), pytest.raises(SetupError, match="cannot be read") as caught:
        read_header(path)
    assert caught.value.why
    assert caught.value.where == str(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind not in ("a key twice",)])
def test_the_library_would_not_read_it_either(tmp_path: Path, kind: str) -> None:
    """Or it reads less than we refuse: those are named here."""
    stricter = {"an entry too many", "a gap in front", "a million axes", "a key twice", "half a character"}
    path = tmp_path / "x.safetensors"
    path.write_bytes(BROKEN[kind])
    try:
        with safe_open(path, framework="pt") as file:
            assert kind in stricter, list(file.keys())
    except (SafetensorError, OSError, ValueError):
        return


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"empty": torch.ones(0, 5)},
        {"scalar": torch.tensor(1.0)},
        {"../../etc/passwd": torch.ones(2), "a/b": torch.ones(1), "\x00": torch.ones(1), "": torch.ones(1)},
        {"e": torch.ones(0), "b": torch.ones(3, dtype=torch.bool), "h": torch.ones(3, dtype=torch.bfloat16)},
    ],
)
def test_strange_but_right_headers_are_read(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A name is only ever a name."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    with nothing_outside(tmp_path):
        found = read_header(path)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }


def test_a_header_larger_than_any_adapter_s_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", LARGEST_HEADER + 1))
        file.truncate(2**36)  # a hole that takes no disk
    with pytest.raises(SetupError, match="none needs more than"):
        read_header(path)


def refused(read: Callable[[], object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read()


def test_json_from_elsewhere_has_limits() -> None:
    many = b"{" + b",".join(b'"%d":0' % n for n in range(10**5)) + b',"99999":1}'
    refused(lambda: parse_object(many, strict=True), "'99999' stands twice")
    refused(lambda: parse_object(b'{"a":' * 101 + b"1" + b"}" * 101), "too deep")
    refused(lambda: parse_object(b'{"a": "\\ud800"}'), "half a character")
    refused(lambda: parse_object(b'{"a": ' + b"9" * 5000 + b"}"), "4300")
    assert parse_object(b'{"a": "\\ud83d\\ude00", "b": [1e5]}') == {"a": "😀", "b": [1e5]}
    assert parse_object(deepest_allowed())


def deepest_allowed() -> bytes:
    return b'{"a":' * 100 + b"1" + b"}" * 100
