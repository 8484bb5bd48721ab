"""Question blocks, personal slots and memory blocks: parsed from text files and turned into exchanges."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from random import Random

from tables import FRAMES, HERE, Row, all_tables, person, phrase, place

HELD_OUT_SHARE = 0.06
END_MARKS = "?.!\u3002\uff1f\uff01"
TO_ASCII = {0xFF1F: "?", 0xFF0C: ",", 0xFF01: "!", 0xFF1A: ":"}
LANGUAGES = ("en", "zh")
TABLES = all_tables()

LOWERABLE = set(FRAMES["lowerable", "en"][0].split())


@dataclass(frozen=True)
class Exchange:
    """One question and its answer."""

    user: str
    answer: str


@dataclass
class Block:
    """A family of questions: lines by mark ("?", "=", "@", ...) and language, over the rows of a table."""

    name: str
    table: str = "-"
    lines: dict[str, list[str]] = field(default_factory=dict)

    def get(self, mark: str, language: str) -> list[str]:
        """Return the lines of a mark in a language (an empty list where there are none)."""
        return self.lines.get(mark + ("zh" if language == "zh" else ""), [])

    def rows(self) -> list[Row]:
        """Return the rows of the block's table (one empty row where it has none)."""
        return TABLES.get(self.table, [{}])


def read_blocks(name: str) -> list[Block]:
    """Parse one of the block files beside this script."""
    blocks: list[Block] = []
    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        head = re.match(r"\[(\w+)\] ?(\S*)", line)
        if head:
            blocks.append(Block(head[1], head[2] or "-"))
        elif line and not line.startswith("#"):
            mark, text = line.split(" ", 1)
            parts = [text] if mark.startswith(("=", "!")) else text.split(" | ")
            if mark.startswith("%") and not text.startswith("@"):
                parts = [part.strip() for part in text.split(";")]
            blocks[-1].lines[mark] = [part.strip() for part in parts]
    return blocks


TALK = read_blocks("talk.txt")
SLOTS = read_blocks("slots.txt")
MEMORY = read_blocks("memory.txt")


def share(text: str) -> float:
    """Map a text to a number in [0, 1) that never changes."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


def is_held_out(core: str, full: str, has_table: bool) -> bool:
    """Say whether a prompt is kept from training.

    Blocks with a table are split by the bare question, the others by the full text, where it is framed.
    """
    key = core if has_table else full
    return (has_table or core != full) and share(
        key.translate(TO_ASCII).lower().rstrip(END_MARKS)
    ) < HELD_OUT_SHARE


def lower_first(text: str) -> str:
    """Lower the first letter where the first word is not a name."""
    return text[0].lower() + text[1:] if text.split()[0] in LOWERABLE else text


def wrap(question: str, language: str, rng: Random) -> str:
    """Put a question into a random frame, and sometimes drop capital letters or the last mark."""
    asks = question.endswith(("?", "\uff1f")) or question.split(" ")[0] in LOWERABLE
    text = question
    if asks and rng.random() < 0.4:
        text = rng.choice(FRAMES["wrap", language]).format(q=question, l=lower_first(question))
    noise = rng.random()
    if noise < 0.08:
        text = text.rstrip(END_MARKS)
    elif noise < 0.14 and language == "en":
        text = lower_first(text)
    elif noise < 0.2 and language == "zh":
        text = text.translate(TO_ASCII)
    return text


def slot_question(block: Block, language: str, rng: Random) -> str:
    """Ask for a slot of a role card or of the memory, never with a held-out prompt."""
    while True:
        core = rng.choice(block.get("?", language))
        user = wrap(core, language, rng)
        if not is_held_out(core, user, has_table=False):
            return user


def draw_row(block: Block, language: str, rng: Random) -> Row:
    """Draw a row of the block's table."""
    if block.table.startswith("phrases"):
        return phrase(rng, language)
    return rng.choice(block.rows())


def ask(block: Block, row: Row, language: str, rng: Random, held_out: bool = False) -> Exchange | None:
    """Make one exchange of a block, or None where the draw fell on the other side of the held-out line."""
    core = rng.choice(block.get("?", language)).format(**row)
    free = block.table.startswith("phrases")
    user = core if free else wrap(core, language, rng)
    if is_held_out(core, user, block.table != "-") != held_out:
        return None
    return Exchange(user, block.get("=", language)[0].format(**row))


def draw_value(block: Block, language: str, rng: Random) -> str:
    """Draw a value for a personal slot or a memory block."""
    values = block.get("%", language) or block.get("%", "en")
    kind = values[0]
    if kind == "@person":
        return person(rng, language)
    if kind == "@place":
        return place(rng, language)
    if kind == "@number":
        return str(rng.randint(2, 130))
    if rng.random() < 0.2:
        return (" and " if language == "en" else "和").join(rng.sample(values, 2))
    return rng.choice(values)
