"""What can go wrong, as a tree. Every error says what happened, where, why, and what to do.

LorasmithError                 exit code
├── ConfigError      (ValueError)    2   a key, a flag or a combination of them is wrong
│   └── FamilyError                  2   no family fits the model directory, or two do
├── DataError        (ValueError)    3   rows that cannot be trained on, named file:line
├── SetupError                       4   model files, hub, tokenizer, output directory, versions
│   ├── TokenizerError               4   the tokenizer does not give the ids it must give
│   └── CheckpointError              4   nothing to resume from, or it belongs to another run
├── MemoryLimitError (MemoryError)   5   one conversation does not fit into memory
├── DivergedError    (ArithmeticError) 6 steps that are not finite, in a row; or a run that does not learn
├── NotReproducedError                6   --resume prove: steps trained again came out otherwise
├── StorageError     (OSError)       7   the disk refused
└── Interrupted      (KeyboardInterrupt) 130  stopped by Ctrl-C, with a checkpoint to go on from
    ├── Terminated                 143   by SIGTERM, or by SIGHUP: its terminal went away
    └── Preempted                   75   by SIGUSR1, which schedulers send before they take the machine
"""

from __future__ import annotations

import re

from lorasmith.redaction import without_secrets

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class LorasmithError(Exception):
    """Base of all errors that a user can meet; the command line prints it without a traceback.

    What libraries say of a failed request may hold tokens: they are masked here, where text becomes an error.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        what, where, why, fix = (printable(without_secrets(text)) for text in (what, where, why, fix))
        super().__init__(what)
        self.what, self.where, self.why, self.fix = what, where, why, fix

    def __str__(self) -> str:
        rows = [("where", self.where), ("why", self.why), ("do", self.fix)]
        return "\n".join([self.what, *(f"  {label + ':':<6} {text}" for label, text in rows if text)])

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.why, self.fix)


def printable(text: str) -> str:
    """What moves a terminal's cursor or turns text around, as \\x1b or \\u202e: names may hold anything."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _rebuild(cls: type[LorasmithError], what: str, where: str, why: str, fix: str) -> LorasmithError:
    return cls(what, where=where, why=why, fix=fix)


class ConfigError(LorasmithError, ValueError):
    exit_code = 2


class FamilyError(ConfigError):
    pass


class DataError(LorasmithError, ValueError):
    exit_code = 3


class SetupError(LorasmithError):
    exit_code = 4


class TokenizerError(SetupError):
    pass


class CheckpointError(SetupError):
    pass


class MemoryLimitError(LorasmithError, MemoryError):
    exit_code = 5


class DivergedError(LorasmithError, ArithmeticError):
    exit_code = 6


class NotReproducedError(LorasmithError):
    exit_code = 6


class StorageError(LorasmithError, OSError):
    exit_code = 7


class Interrupted(LorasmithError, KeyboardInterrupt):
    exit_code = 130


class Terminated(Interrupted):
    exit_code = 143


class Preempted(Interrupted):
    exit_code = 75
