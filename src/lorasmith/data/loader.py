"""Which conversations a training step sees: a pure function of examples, seed and step number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lorasmith.config import TrainConfig
from lorasmith.data.columns import lengths_of, target_counts_of
from lorasmith.data.pack import lay_out, pack_rows
from lorasmith.errors import DataError
from lorasmith.types import Batch, Example, Ints


def training_loader(examples: Sequence[Example], config: TrainConfig) -> Loader:
    """The steps of a training run, from its own settings."""
    return Loader(
        examples,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
        seed=config.seed,
        shuffle=config.shuffle,
    )


class Loader:
    """Batches by the number of their optimizer step; there is no state that a resume would have to restore.

    An epoch visits every example once, `batch_size` of them per step; its last step may have fewer.

    Raises: DataError if there are no examples.
    """

    def __init__(
        self, examples: Sequence[Example], *, batch_size: int, max_tokens: int, seed: int, shuffle: bool
    ) -> None:
        if not examples:
            raise DataError("there are no rows to train on", fix="lorasmith data check says where they went")
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.seed, self.shuffle = seed, shuffle
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
        return tuple(self._examples[index] for index in indices)

    def origins(self, n: int) -> tuple[str, ...]:
        """Where the conversations of step n came from."""
        return tuple(example.origin for example in self.examples(n))

    def step(self, n: int) -> tuple[Batch, ...]:
        """The flat rows of global step n, each of at most `max_tokens` where its conversations allow."""
        examples = self.examples(n)
        batches: list[Batch] = []
        laid_out = 0
        for row in pack_rows([len(example) for example in examples], self.max_tokens):
            batches.append(lay_out([examples[index] for index in row], laid_out))
            laid_out += len(batches[-1].input_ids)
        return tuple(batches)

    def _order_of_epoch(self, epoch: int) -> Ints:
        if not self.shuffle:
            return np.arange(self.num_examples)
        # Raw Philox bits: NumPy keeps those the same in every version, and `permutation` not (NEP 19).
        bits = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(
            self.num_examples
        )
        return np.argsort(bits, kind="stable")
