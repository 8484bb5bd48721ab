"""A chat template from elsewhere may neither run for ever, nor fill the memory, nor take the run with it."""

from __future__ import annotations

import copy
import os
import pickle
import re
import signal
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import jinja2
import pytest
import tokenizers_factory as factory

from lorasmith.data.encode import encode_conversations
from lorasmith.errors import DataError, SetupError
from lorasmith.families.generic import by_template
from lorasmith.testing.texts import random_texts
from lorasmith.text import render
from lorasmith.text.loading import load_tokenizer
from lorasmith.text.render import ChatTemplate
from lorasmith.text.render_worker import _environment
from lorasmith.types import Conversation, Message

ASK = [{"role": "user", "content": "hi"}]
STOPPED = {
    "endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "computes for longer",
    ),
    "big integers": ("{% set n = messages | length + 8 %}{{ n ** (n ** n) > 1 }}", "computes for longer"),
    "constant folding": ("{{ 9 ** (9 ** 9) > 1 }}", "computes for longer"),
    "memory": ("{{ 'a' * (10 ** 10 * messages | length) }}", "more memory than 1,024 MB"),
    "memory, while compiling": ("{{ 'a' * 10 ** 10 }}", "more memory than 1,024 MB"),
    "many strings": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "more memory than 1,024 MB|computes for longer",  # some machines take seconds to hand out a gigabyte
    ),
    "huge output": ("{{ 'a' * (10 ** 8 * messages | length) }}", "writes more than 4,194,304 characters"),
}
REFUSED = {
    "macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "include": "{% include '/etc/passwd' %}",
    "environment": "{{ raise_exception.__globals__['os'] }}",
}


@pytest.mark.parametrize("name", STOPPED)
def test_what_never_ends_is_stopped(name: str) -> None:
    source, why = STOPPED[name]
    template = ChatTemplate(source, {})
    began = time.process_time()
    with pytest.raises(SetupError, match="was stopped") as caught:
        template.render(ASK, add_generation_prompt=False)
    assert re.search(why, caught.value.why)
    assert time.process_time() - began < 1, "the work was not done in this process"


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_sandbox_forbids_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="refuses this conversation"):
        ChatTemplate(REFUSED[name], {}).render(ASK, add_generation_prompt=False)


def test_a_long_reason_is_cut() -> None:
    template = ChatTemplate("{{ raise_exception('no' * 1000000) }}", {})
    with pytest.raises(DataError) as caught:
        template.render(ASK, add_generation_prompt=False)
    assert len(caught.value.why) < 2000


def test_the_conversation_that_breaks_a_limit_is_named(tmp_path: Path) -> None:
    loop = "{% if 'bomb' in messages[0].content %}" + STOPPED["endless loop"][0] + "{% endif %}"
    written = by_template(load_tokenizer(factory.chatml(tmp_path, loop + factory.CHATML)), ())
    rows = [
        Conversation((Message("user", text), Message("assistant", "yes")), f"rows.jsonl:{i}")
        for i, text in enumerate(["a", "b", "a bomb", "c"], start=1)
    ]
    with pytest.raises(SetupError, match="was stopped") as caught:
        encode_conversations(rows, written, max_length=None, over_length="error")
    assert caught.value.where == "rows.jsonl:3"
    assert [len(written.encode(row)) for row in (rows[0], rows[3])], "the rest still runs"


def test_a_process_that_dies_between_two_renderings_is_told_and_replaced() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert template.render(ASK, add_generation_prompt=False) == "hi"
    process = template._process
    assert process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(SetupError, match="was stopped") as caught:
        template.render(ASK, add_generation_prompt=False)
    assert "code -9" in caught.value.why
    assert template.render(ASK, add_generation_prompt=False) == "hi"


def test_no_secret_of_the_environment_is_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    template = ChatTemplate("a", {})
    template.render(ASK, add_generation_prompt=False)
    process = template._process
    assert process is not None
    environ = Path(f"/proc/{process._process.pid}/environ")
    if not environ.exists():
        pytest.skip("no /proc here")
    assert b"HF_TOKEN" not in environ.read_bytes()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_template_travels(again: Callable[[ChatTemplate], ChatTemplate]) -> None:
    template = ChatTemplate(
        "{{ strftime_now('%Y-%m-%d') }} {{ bos_token }}", {"bos_token": "<s>"}, datetime(2025, 7, 9)
    )
    assert again(template).render(ASK, add_generation_prompt=False) == "2025-07-09 <s>"


def test_the_process_ends_with_its_template() -> None:
    template = ChatTemplate("a", {})
    template.render(ASK, add_generation_prompt=False)
    process = template._process
    assert process is not None
    del template
    assert process._process.wait(5) is not None


@pytest.mark.parametrize("source", [factory.CHATML, factory.CHATML_GENERATION], ids=["plain", "generation"])
def test_the_same_characters_as_without_a_process(tmp_path: Path, source: str) -> None:
    texts = random_texts(load_tokenizer(factory.chatml(tmp_path)), 600)
    here: jinja2.Template = _environment(datetime(2025, 7, 9)).from_string(source)
    requests = [
        ([{"role": "user", "content": a}, {"role": "assistant", "content": b}], bool(i % 2))
        for i, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]
    wanted = [
        here.render(messages=m, tools=None, documents=None, add_generation_prompt=p) for m, p in requests
    ]
    assert ChatTemplate(source, {}, datetime(2025, 7, 9)).render_all(requests) == wanted


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert template.render(ASK, add_generation_prompt=False) == "hi"
    process = template._process
    assert process is not None
    monkeypatch.setattr(render, "_WALL_SECONDS", 0.1)
    os.kill(process._process.pid, signal.SIGSTOP)
    with pytest.raises(SetupError, match="was stopped") as caught:
        template.render(ASK, add_generation_prompt=False)
    assert "takes longer than" in caught.value.why
