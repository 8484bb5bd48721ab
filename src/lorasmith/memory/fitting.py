"""How much a run computes at once: chosen at the start, and made smaller each time that memory runs out.

None of it changes the result, up to rounding: the loss of a step is a sum over its targets, however cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn, TypeVar

import peft

from lorasmith.batching.source import StepSource
from lorasmith.config import TrainConfig
from lorasmith.errors import MemoryLimitError
from lorasmith.memory.estimate import layers_asked, needed_memory
from lorasmith.memory.limits import free_memory, is_out_of_memory, release_caches
from lorasmith.model.checkpointing import RecomputedLayers
from lorasmith.model.load import module_dtype
from lorasmith.model.packed import PackedModule

T = TypeVar("T")
_STEPS_LOOKED_AT = 20
"""For the largest row: memory is asked for before the first step, not before each."""


@dataclass(frozen=True)
class Room:
    """What is computed at once."""

    max_tokens: int
    """Of a flat row."""
    recomputed_layers: int
    """The first so many decoder layers keep their input only."""


def smaller(room: Room, *, widest: int, longest: int, num_layers: int) -> Room | None:
    """What to try after `room` did not fit a step; None if nothing is left.

    Rows are halved down to single conversations, then layers recompute: a quarter, half, all. `widest`: the
    tokens of the step's largest row; `longest`: of its longest conversation; `num_layers`: how many may.
    """
    if widest > longest:
        return replace(room, max_tokens=widest // 2)
    if room.recomputed_layers < num_layers:
        more = max(2 * room.recomputed_layers, -(-num_layers // 4))
        return replace(room, recomputed_layers=min(num_layers, more))
    return None


class Fitting:
    """Runs what needs memory, again in smaller parts where it ran out of it.

    `room` is what a checkpoint remembers, or None; `told` hears of each room that was too large and of the
    one that is tried instead.
    """

    def __init__(
        self,
        source: StepSource,
        config: TrainConfig,
        rows: PackedModule,
        layers: RecomputedLayers,
        *,
        room: Room | None,
        told: Callable[[Room], None],
    ) -> None:
        self._source, self._config, self._rows, self._layers = source, config, rows, layers
        self._told = told
        self.room = room or Room(config.max_tokens, recomputed_layers=0)
        rows.row_length = self._row_length()

    def begin(self, model: peft.PeftModel, step: int, total_steps: int) -> None:
        """As few layers recompute as the free memory asks for, by the rows of the next steps."""
        steps = range(step, min(total_steps, step + _STEPS_LOOKED_AT))
        rows = [batch for n in steps for batch in self._source.step(n, self.room.max_tokens)]
        if not rows:
            return
        rows = [self._rows.as_computed(batch) for batch in rows]
        needed = needed_memory(model, rows, module_dtype(self._rows.base), self._rows.device)
        asked, free = self._config.activation_checkpointing, free_memory(self._rows.device)
        layers = layers_asked(model, asked, free, lambda count: needed(count).to_come)
        if asked == "auto":
            layers = max(layers, min(self.room.recomputed_layers, len(self._layers)))
        self.room = replace(self.room, recomputed_layers=layers)
        self._layers.use(layers)

    def step(self, n: int, compute: Callable[[int], T], discard: Callable[[], None]) -> T:
        """compute(max_tokens) for step n; `discard` drops what a failed try left.

        Raises: MemoryLimitError if one conversation, with all layers recomputing, is too much.
        """
        return self._repeat(lambda: compute(self.room.max_tokens), partial(self._shrink, n, discard))

    def evaluation(self, compute: Callable[[int], T]) -> T:
        """compute(max_tokens), which keeps nothing for a backward pass."""
        return self._repeat(lambda: compute(self.room.max_tokens), self._shrink_rows)

    def once(self, what: str, compute: Callable[[], T]) -> T:
        """compute(), which cannot be done again. Raises: MemoryLimitError."""
        return self._repeat(compute, partial(_refuse, what))

    def _repeat(self, compute: Callable[[], T], shrink: Callable[[str], None]) -> T:
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            # Not before the error is gone: its traceback holds what was computed.
            release_caches(self._rows.device)
            shrink(why)

    def _shrink(self, n: int, discard: Callable[[], None], why: str) -> None:
        discard()
        release_caches(self._rows.device)
        rows, alone = (self._source.step(n, most) for most in (self.room.max_tokens, 0))
        widest, longest = (max(len(batch.input_ids) for batch in some) for some in (rows, alone))
        widest = max(widest, self._rows.row_length or 0)  # padding goes before layers recompute
        may_recompute = len(self._layers) if self._config.activation_checkpointing == "auto" else 0
        room = smaller(self.room, widest=widest, longest=longest, num_layers=may_recompute)
        if room is None:
            origin, _ = max(self._source.alone(n), key=lambda row: len(row[1].input_ids))
            _refuse(f"step {n + 1}, with {longest:,} tokens of {origin},", why)
        self._layers.use(room.recomputed_layers)
        self._take(room)

    def _shrink_rows(self, why: str) -> None:
        if self.room.max_tokens == 1:
            _refuse("an evaluation", why)
        self._take(replace(self.room, max_tokens=self.room.max_tokens // 2))

    def _take(self, room: Room) -> None:
        self.room = room
        self._rows.row_length = self._row_length()
        self._told(room)

    def _row_length(self) -> int | None:
        """Rows are static as long as the asked `max_tokens` is in force."""
        asked = self._config.max_tokens
        return asked if self._config.static_rows and self.room.max_tokens == asked else None


def _refuse(what: str, why: str) -> NoReturn:
    raise MemoryLimitError(
        f"{what} does not fit into memory",
        why=why,
        fix="lower data.max_length; or take a smaller model, a lower lora.r, dtype bf16, or "
        "train.activation_checkpointing: auto",
    )
