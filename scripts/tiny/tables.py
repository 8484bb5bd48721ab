"""The tables of Tiny's small world: read from ``world.txt`` or computed (sums, counting, phrases)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
Row = dict[str, str]
Draw = Callable[[Random], Row]


def read_frames(path: Path = HERE / "frames.txt") -> dict[tuple[str, str], list[str]]:
    """Read the lines of every ``[name language]`` section of the frames file; leading spaces count."""
    frames: dict[tuple[str, str], list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        head = re.match(r"\[(\w+) (\w+)\]", line)
        if head:
            lines = frames.setdefault((head[1], head[2]), [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return frames


def read_tables(path: Path = HERE / "world.txt") -> dict[str, list[Row]]:
    """Read every ``[name] fields`` section of the world file."""
    tables: dict[str, list[Row]] = {}
    fields: list[str] = []
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        head = re.match(r"\[(\w+)\] (.+)", line)
        if head:
            fields, rows = head[2].split(), tables.setdefault(head[1], [])
        elif line and not line.startswith("#"):
            rows.append(dict(zip(fields, (cell.strip() for cell in line.split("|")), strict=True)))
    return tables


WORLD = read_tables()
FRAMES = read_frames()
SYLLABLES = FRAMES["syllables", "en"][0].split()
NAME_CHARACTERS = FRAMES["name_characters", "zh"][0]
ALL_WORDS = [{"en": row["en"], "zh": row["zh"]} for row in WORLD["words"] + WORLD["more"]]
CHARACTERS = sorted({char for row in WORLD["wenzi"] for char in row["chars"]})
MANY_CHARACTERS = [
    char
    for first in range(0xB0, 0xD8)
    for char in bytes(byte for second in range(0xA1, 0xFF) for byte in (first, second)).decode(
        "gb2312", "ignore"
    )
]


def article(noun: str) -> str:
    """Put the right indefinite article before an English noun."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def word_name(rng: Random) -> str:
    """Make up a name that can be pronounced."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def person(rng: Random, language: str) -> str:
    """Draw a person's name, invented more often than known."""
    if rng.random() < 0.3:
        return rng.choice(WORLD["given"])["zi" if language == "zh" else "name"]
    if language == "zh":
        pool = rng.choices((NAME_CHARACTERS, CHARACTERS, MANY_CHARACTERS), (5, 3, 2))[0]
        return "".join(rng.choice(pool) for _ in range(rng.randint(2, 4)))
    first = word_name(rng)
    return f"{first} {word_name(rng)}" if rng.random() < 0.3 else first


def place(rng: Random, language: str) -> str:
    """Draw a place, invented more often than known."""
    if rng.random() < 0.25:
        return rng.choice(WORLD["countries"])["shoudu" if language == "zh" else "capital"]
    if language == "zh":
        return "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(1, 3))) + rng.choice(
            FRAMES["place_end", "zh"]
        )
    return word_name(rng) + rng.choice(FRAMES["place_end", "en"])


def phrase(rng: Random, language: str) -> Row:
    """Draw a phrase to repeat: words, invented names, numbers, loose Chinese characters."""
    words = []
    for _ in range(4):
        pick = rng.random()
        if pick < 0.5:
            words.append(rng.choice(ALL_WORDS)[language])
        elif pick < 0.8:
            words.append(person(rng, language))
        elif pick < 0.9:
            words.append(str(rng.randint(0, 999)))
        elif language == "zh":
            pool = rng.choice((CHARACTERS, MANY_CHARACTERS))
            words.append("".join(rng.choice(pool) for _ in range(rng.randint(1, 5))))
        else:
            words.append(word_name(rng).lower())
    return {"p": rng.choice(FRAMES["phrase", language]).format(*words)}


def both_ways(rows: list[Row], left: str, right: str) -> list[Row]:
    """Make a table of pairs symmetric; the first meaning of a word wins."""
    pairs: dict[str, str] = {}
    for row in rows:
        pairs.setdefault(row[left], row[right])
    for row in rows:
        pairs.setdefault(row[right], row[left])
    return [{left: key, right: value} for key, value in pairs.items()]


def words_of(row: Row) -> Row:
    """Add fields derived from a row: articles and capital first letters."""
    made = dict(row)
    for field in ("en", "cat"):
        if field in row:
            made[f"a_{field}"] = article(row[field])
            made[f"A_{field}"] = article(row[field]).capitalize()
    if "thing" in row:
        made["Thing"] = row["thing"][0].upper() + row["thing"][1:]
    return made


def number_rows() -> dict[str, list[Row]]:
    """Compute sums, differences, comparisons, neighbours and counting."""
    names = {int(row["n"]): row for row in WORLD["numbers"]}

    def cells(a: int, b: int, **more: str) -> Row:
        row = {"a": str(a), "b": str(b), "aw": names[a]["word"], "bw": names[b]["word"]}
        return {**row, "az": names[a]["zi"], "bz": names[b]["zi"], **more}

    digits = range(10)
    counts = [(a, b) for a in range(1, 8) for b in range(a + 2, 11)]
    return {
        "sums": [cells(a, b, c=str(a + b)) for a in digits for b in digits],
        "minus": [cells(a, b, c=str(a + b)) for a in digits for b in digits if a + b < 11],
        "pairs": [cells(a, b, c=str(max(a, b)), d=str(min(a, b))) for a in digits for b in digits if a != b],
        "numbers_next": [{"n": str(n), "m": str(n + 1)} for n in range(1, 20)],
        "counts": [cells(a, b, list=", ".join(str(n) for n in range(a, b + 1))) for a, b in counts],
    }


def kinds() -> tuple[list[Row], list[Row]]:
    """Pair words with wrong kinds, and give every kind its first three words."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in WORLD["words"]:
        groups.setdefault((row["cat"], row["lei"]), []).append(row)
    mixed = [
        {**words_of(row), "a_wrong": article(cat), "cuo": lei}
        for row in WORLD["words"]
        for cat, lei in groups
        if cat != row["cat"]
    ]
    trios = []
    for (cat, lei), rows in groups.items():
        many = cat.replace("piece", "pieces") if cat.startswith("piece") else cat + "s"
        first, second, third = (article(row["en"]) for row in rows[:3])
        lie = "、".join(row["zh"] for row in rows[:3])
        trios.append({"many": many, "lei": lei, "list": f"{first}, {second} and {third}", "lie": lie})
    return mixed, trios


def all_tables() -> dict[str, list[Row]]:
    """Every finite table by name, with derived fields."""
    tables = {name: [words_of(row) for row in rows] for name, rows in WORLD.items()}
    tables.update(number_rows())
    tables["mixed"], tables["trios"] = kinds()
    tables["dict"] = [words_of(row) for row in ALL_WORDS]
    tables["opposites2"] = both_ways(WORLD["opposites"], "word", "other")
    tables["fanyi2"] = both_ways(WORLD["fanyi"], "ci", "fan")
    return tables
