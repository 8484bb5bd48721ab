"""The words everybody speaks: the values that travel from one room to the next, all frozen.

jsonl -> Conversation -> Pieces -> Example -> Batch (+ Layout) -> loss -> adapter
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100
"""The label of a position that has nothing to predict."""

Role = Literal["system", "user", "assistant"]
Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. Raises ValueError for a role that is not system, user or assistant."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, not {self.role!r}")
        if not isinstance(self.content, str):
            raise TypeError(f"content must be text, not {type(self.content).__name__}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and where they came from ("huanhuan.json:17"), quoted by every later error."""

    messages: tuple[Message, ...]
    origin: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation: plain text, or the id of one special token.

    Plain text is encoded with special tokens switched off, so it can never become one.
    """

    content: str | int
    trained: bool = False
    """The model is to produce this piece."""
    target: int | None = None
    """For a special token: predict this id where the token stands, instead of the token itself."""


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation as token ids. `labels[t]` is what position t must predict: already shifted."""

    input_ids: Ints  # (T,)
    labels: Ints  # (T,)
    origin: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", np.asarray(self.input_ids, dtype=np.int64))
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int64))
        if self.input_ids.ndim != 1 or self.input_ids.shape != self.labels.shape:
            raise ValueError(
                f"{self.origin or 'example'}: input_ids {self.input_ids.shape} and labels "
                f"{self.labels.shape} must be two rows of one length"
            )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True, eq=False)
class Layout:
    """Which tokens of a flat row may see which.

    Segment s is tokens starts[s]:starts[s+1]; it continues segment parents[s], which stands before it, or
    none (-1). A token sees itself, the tokens before it in its segment, and every token of the segments that
    it continues. A conversation ends in a segment that none continues; equal conversations end in one.
    """

    starts: Ints  # (S+1,)
    parents: Ints  # (S,)
    position_ids: Ints  # (T,) position in the token's own conversation

    @property
    def lengths(self) -> Ints:
        return np.diff(self.starts)


@dataclass(frozen=True, eq=False)
class Batch:
    """One flat row of conversations laid end to end, without padding; what they have in common may stand
    once."""

    input_ids: Ints  # (T,)
    labels: Ints  # (T,)
    weights: Floats  # (T,) how many conversations of this row own the token, and its loss
    layout: Layout
    token_numbers: Ints  # (T,) the token's number in its step, however the step is cut: keys dropout masks

    @property
    def num_targets(self) -> float:
        return float(self.weights[self.labels != IGNORE_INDEX].sum(dtype=np.float64))

    @property
    def num_tokens(self) -> int:
        """Tokens of its conversations, a shared one counted for each; what is computed is (T,)."""
        return int(self.weights.sum(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer. `finish_reason` is "stop" at a stop token and "length" where max_new_tokens cut it."""

    content: str
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_completion_tokens: int
