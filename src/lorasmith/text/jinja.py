"""TemplateFormat: a chat format read off the tokenizer's own chat template, for any transformers chat model.

The template is rendered to text, the text is cut at its control tokens, and what is trained is found by
rendering the conversation turn by turn: each prompt must be the beginning of what is trained.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias, final

from lorasmith.errors import DataError, FamilyError
from lorasmith.text.render import ChatTemplate, Rendering, take_spans
from lorasmith.text.render_worker import SPAN_END, SPAN_START
from lorasmith.text.template import ChatFormat, check_turns, told_at
from lorasmith.tokenization.fast import FastTokenizer
from lorasmith.types import Conversation, Message, Piece

Span: TypeAlias = tuple[int, int]
_Rendered: TypeAlias = Mapping[tuple[int, bool], Rendering]
"""Of one conversation: by the number of its messages, and whether as a prompt."""
_ANSWER = "Answer"
_PROBES = (
    (Message("user", "Question"), Message("assistant", _ANSWER)),
    (Message("system", "System"), Message("user", "Question"), Message("assistant", _ANSWER)),
)


@final
class TemplateFormat(ChatFormat):
    """`extra_stop_ids` are those of generation_config.json; `now` is what templates print as today.

    `behind_last_answer` is a special token that the template leaves out: where it is the next turn's role
    token that ends an answer, the last one must end in it too.

    Raises: FamilyError if there is no chat template, it is not jinja, or writes no token that ends an answer.
    """

    joint_text = True

    def __init__(
        self,
        tokenizer: FastTokenizer,
        extra_stop_ids: Sequence[int] = (),
        *,
        now: datetime | None = None,
        behind_last_answer: str = "",
    ) -> None:
        if tokenizer.chat_template is None:
            raise FamilyError(
                "the model directory has no chat template",
                why="a family without a format of its own needs chat_template.jinja, or chat_template in "
                "tokenizer_config.json",
                fix="use the chat version of this model (base models have none), or choose a --family",
            )
        self._source = tokenizer.chat_template
        self._template = ChatTemplate(self._source, tokenizer.named, now)
        self._behind_last_answer = behind_last_answer
        self._controls = tokenizer.control_pattern
        self._reserved = re.compile(f"{SPAN_START}|{SPAN_END}|{_literals(tokenizer.special_tokens)}")
        self._special_tokens = tokenizer.special_tokens
        eos_ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        super().__init__("official", tokenizer, [*eos_ids, *extra_stop_ids, self._end_of_turn()])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        """Raises: DataError if the template refuses the messages, or renders a turn otherwise in training;
        SetupError if it breaks a limit.
        """
        script = self._script(messages)
        return self._pieces(script, self._rendered([script], for_generation)[0], for_generation)

    def pieces_of_all(
        self, conversations: Sequence[Conversation], *, for_generation: bool
    ) -> list[list[Piece]]:
        """All in one exchange with the template's process. Raises: as `pieces`, naming the conversation."""
        scripts = [self._script(conversation.messages) for conversation in conversations]
        pieces_of_all = []
        written = zip(conversations, scripts, self._rendered(scripts, for_generation), strict=True)
        for conversation, script, rendered in written:
            with told_at(conversation.origin):
                check_turns(conversation, for_generation)
                pieces_of_all.append(self._pieces(script, rendered, for_generation))
        return pieces_of_all

    def _pieces(self, script: _Script, rendered: _Rendered, for_generation: bool) -> list[Piece]:
        written = self._written(script, rendered, len(script.messages), for_generation)
        text, spans = take_spans(written)
        if for_generation:
            return list(self._cut(text, [], [], script))
        turns = list(self._turns(script, rendered, text))
        return list(self._cut(text, spans or turns, [start for start, _ in turns], script))

    def _rendered(self, scripts: Sequence[_Script], for_generation: bool) -> list[_Rendered]:
        """Each script whole, and its beginnings that `_turns` looks at."""
        wanted = [_wanted(script, for_generation) for script in scripts]
        requests = [
            (script.messages[:count], prompt)
            for script, keys in zip(scripts, wanted, strict=True)
            for count, prompt in keys
        ]
        found = iter(self._template.render_all(requests))
        return [dict(zip(keys, found, strict=False)) for keys in wanted]  # a limit ends it early

    def _script(self, messages: Sequence[Message]) -> _Script:
        """Messages in which the text of every control token is a word that no template knows."""
        contents = "\n".join(message.content for message in messages)
        word = "qz"
        while word in contents or word in self._source:
            word += "z"
        script = _Script(word)
        for message in messages:
            content = self._reserved.sub(script.disguise, message.content)
            script.messages.append({"role": message.role, "content": content})
        return script

    def _turns(self, script: _Script, rendered: _Rendered, full: str) -> Iterator[Span]:
        """Where each answer lies in `full`, up to and including the token that ends it."""
        for index, message in enumerate(script.messages):
            if message["role"] != "assistant":
                continue
            prompt = take_spans(self._written(script, rendered, index, True))[0]
            is_last = index + 1 == len(script.messages)  # then `full` is that very text
            upto = full if is_last else take_spans(self._written(script, rendered, index + 1, False))[0]
            if not upto.startswith(prompt):
                raise _not_a_prefix(
                    index, "the prompt for it is not how the trained text begins", prompt, upto
                )
            end = self._end_of_answer(upto, len(prompt), index)
            if not full.startswith(upto[:end]):
                raise _not_a_prefix(
                    index, "it is written otherwise once later turns follow", upto[:end], full
                )
            yield len(prompt), end

    def _written(self, script: _Script, rendered: _Rendered, count: int, is_prompt: bool) -> str:
        """The first `count` messages. Raises: DataError, SetupError where the template did not write them."""
        text = rendered[count, is_prompt]
        if isinstance(text, Exception):
            raise text
        is_answered = not is_prompt and count > 0 and script.messages[count - 1]["role"] == "assistant"
        return text + self._behind_last_answer if is_answered else text

    def _end_of_answer(self, text: str, start: int, index: int) -> int:
        for match in self._controls.finditer(text, start):
            token = match.lastindex or 0
            if self._special_tokens[match[token]] in self.stop_ids:
                return match.end(token)
        raise DataError(
            f"the chat template writes no stop token after message {index + 1}",
            why="trained on this, the model would never learn to stop",
            fix="use a model whose chat template ends its answers with a token",
        )

    def _end_of_turn(self) -> int:
        """The control token that the template writes behind an answer."""
        refusal = ""
        for probe in _PROBES:
            script = self._script(probe)
            try:
                rendered = self._rendered([script], False)[0]
                text = take_spans(self._written(script, rendered, len(probe), False))[0]
            except DataError as error:  # some templates demand a system message, others refuse it
                refusal = f"{error.what}: {error.why}"
                continue
            _, answer, behind = text.rpartition(_ANSWER)
            match = self._controls.search(behind)
            if answer and match:
                return self._special_tokens[match[match.lastindex or 0]]
        raise FamilyError(
            "the model's chat template writes no token that ends an answer",
            why=refusal or "trained with it, the model would never learn to stop",
            fix="use a chat model whose template ends answers with its eos or end-of-turn token",
        )

    def _cut(
        self, text: str, trained: Sequence[Span], cuts: Sequence[int], script: _Script
    ) -> Iterator[Piece]:
        """`text` as pieces: cut at control tokens, where training starts or ends, and at `cuts`."""
        edges = sorted({0, *cuts, *(edge for span in trained for edge in span)})
        at = 0
        for match in self._controls.finditer(text):
            yield from _text_pieces(text, at, match.start(), edges, trained, script)
            token = match.lastindex or 0
            yield Piece(self._special_tokens[match[token]], trained=_inside(match.start(token), trained))
            at = match.end()
        yield from _text_pieces(text, at, len(text), edges, trained, script)


@dataclass(frozen=True)
class _Script:
    """Messages as the template sees them, and what their disguised words stand for."""

    word: str
    messages: list[dict[str, str]] = field(default_factory=list)
    originals: list[str] = field(default_factory=list)

    def disguise(self, match: re.Match[str]) -> str:
        self.originals.append(match[0])
        return f"{self.word}{len(self.originals) - 1}q"

    def reveal(self, text: str) -> str:
        if not self.originals:
            return text
        return re.sub(f"{self.word}([0-9]+)q", lambda match: self.originals[int(match[1])], text)


def _wanted(script: _Script, for_generation: bool) -> list[tuple[int, bool]]:
    """How many messages, and whether as a prompt; in the order in which they are looked at."""
    keys = [(len(script.messages), for_generation)]
    if not for_generation:
        answers = [i for i, message in enumerate(script.messages) if message["role"] == "assistant"]
        keys += [key for index in answers for key in ((index, True), (index + 1, False))]
    return list(dict.fromkeys(keys))


def _text_pieces(
    text: str, start: int, end: int, edges: Sequence[int], trained: Sequence[Span], script: _Script
) -> Iterator[Piece]:
    while start < end:
        following = bisect_right(edges, start)
        stop = min(end, edges[following]) if following < len(edges) else end
        yield Piece(script.reveal(text[start:stop]), trained=_inside(start, trained))
        start = stop


def _inside(position: int, spans: Sequence[Span]) -> bool:
    return any(start <= position < end for start, end in spans)


def _literals(tokens: Mapping[str, int]) -> str:
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)"


def _not_a_prefix(index: int, what: str, part: str, whole: str) -> DataError:
    same = next(
        (n for n, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole))
    )
    return DataError(
        f"message {index + 1}, an answer, cannot be trained with this model's chat template",
        why=f"{what}: {part[same : same + 40]!r} becomes {whole[same : same + 40]!r}",
        fix="split the conversation so that this answer is its last message, or use a model whose chat "
        "template does not rewrite earlier turns",
    )
