"""Which conversations a training step sees: a pure function of examples, seed and step number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from lorasmith.batching.columns import lengths_of, target_counts_of
from lorasmith.batching.pack import lay_out, pack
from lorasmith.config import TrainConfig
from lorasmith.errors import DataError
from lorasmith.types import Batch, Example, Ints

_PLANNED_TOGETHER = 256
"""Conversations of an evaluation: enough to fill rows, few enough to hold."""


def training_loader(examples: Sequence[Example], config: TrainConfig, *, packed: bool) -> Loader:
    """The steps of a training run, from its own settings."""
    return Loader(
        examples,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
        seed=config.seed,
        shuffle=config.shuffle,
        share_prefixes=config.share_prefixes,
        packed=packed,
    )


def held_out_loader(examples: Sequence[Example], config: TrainConfig, *, packed: bool) -> Loader | None:
    """The held-out rows of a training run, packed as its own; None where there are none."""
    if not len(examples):
        return None
    how = {"share_prefixes": config.share_prefixes, "packed": packed}
    return evaluation_loader(examples, config.max_tokens, **how)


def evaluation_loader(
    examples: Sequence[Example], max_tokens: int, *, share_prefixes: bool = True, packed: bool
) -> Loader:
    """All examples in their order, some hundreds planned at a time."""
    return Loader(
        examples,
        batch_size=_PLANNED_TOGETHER,
        max_tokens=max_tokens,
        seed=0,
        shuffle=False,
        share_prefixes=share_prefixes,
        packed=packed,
    )


class Loader:
    """Batches by the number of their optimizer step; there is no state that a resume would have to restore.

    An epoch visits every example once, `batch_size` of them per step; its last step may have fewer. How a
    step is cut into rows changes neither its conversations nor its loss. `share_prefixes`: what
    conversations have in common stands once per row, which changes dropout's masks only. Not `packed`: each
    conversation has a row of its own, for models whose attention does not go by a Layout.

    Examples are read by index, a step's at a time. Raises: DataError if there are none.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        max_tokens: int,
        seed: int,
        shuffle: bool,
        share_prefixes: bool = True,
        packed: bool = True,
    ) -> None:
        if not len(examples):
            raise DataError("there are no rows to train on", fix="lorasmith data check says where they went")
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.seed, self.shuffle = seed, shuffle
        self.share_prefixes, self.packed = share_prefixes, packed
        self._examples = examples
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    @property
    def num_examples(self) -> int:
        return len(self._examples)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.batch_size)

    @property
    def num_tokens(self) -> int:
        """Input ids of one epoch."""
        return int(lengths_of(self._examples).sum())

    @property
    def num_targets(self) -> int:
        """Labels of one epoch."""
        return int(target_counts_of(self._examples).sum())

    def epoch_of(self, n: int) -> int:
        """The epoch, from 0, of global step n, from 0."""
        return n // self.steps_per_epoch

    def examples(self, n: int) -> tuple[Example, ...]:
        """The conversations of global step n, in their order."""
        epoch, step = divmod(n, self.steps_per_epoch)
        indices = self._order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        return tuple(self._examples[index] for index in indices.tolist())

    def origins(self, n: int) -> tuple[str, ...]:
        """Where the conversations of step n came from."""
        return tuple(example.origin for example in self.examples(n))

    def step(self, n: int, max_tokens: int | None = None) -> tuple[Batch, ...]:
        """The flat rows of global step n, each of at most `max_tokens` where its conversations allow.

        None: the loader's own. 0: every distinct conversation has a row of its own.
        """
        if not self.packed:  # no room for a second one
            return pack(self.examples(n), 0, share_prefixes=False)
        most = self.max_tokens if max_tokens is None else max_tokens
        return pack(self.examples(n), most, share_prefixes=self.share_prefixes)

    def alone(self, n: int) -> list[tuple[str, Batch]]:
        """The conversations of global step n, each in a row of its own, with where it came from."""
        return [(example.origin, lay_out([example])) for example in self.examples(n)]

    def epoch(self, number: int = 0, *, max_tokens: int | None = None) -> Iterator[Batch]:
        """The rows of all steps of an epoch, each planned when it is asked for."""
        for n in range(number * self.steps_per_epoch, (number + 1) * self.steps_per_epoch):
            yield from self.step(n, max_tokens)

    def _order_of_epoch(self, epoch: int) -> Ints:
        if not self.shuffle:
            return np.arange(self.num_examples)
        # Raw Philox bits: NumPy keeps those the same in every version, and `permutation` not (NEP 19).
        bits = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(
            self.num_examples
        )
        return np.argsort(bits, kind="stable")
