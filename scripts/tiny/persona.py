"""Write the persona data set: the rows of ``persona.txt``, and questions of the world in the same voice.

python scripts/tiny/persona.py
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from blocks import ask, draw_row
from corpus import WORLD
from tables import HERE

ASSETS = HERE.parents[1] / "src/lorasmith/assets"
LOWERED = {"A", "An", "The", "In", "After", "Before", "Three", "No", "Yes"}
Row = dict[str, object]


def read_rows(path: Path = HERE / "persona.txt") -> tuple[list[Row], list[Row]]:
    """Read the rows to train on and the held-out rows."""
    rows: list[Row] = []
    held_out: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        questions, rest = line.split(" => ")
        answer, *facts = rest.split(" ## ")
        for question in questions.split(" | "):
            row: Row = {"instruction": question, "input": "", "output": answer}
            if facts:
                held_out.append({**row, "facts": facts[0].split(" | ")})
            else:
                rows.append(row)
    return rows, held_out


def in_voice(answer: str, language: str) -> str:
    """Put an answer of the base model into the keeper's mouth."""
    if language == "zh":
        return "嘿，" + answer
    first, _, rest = answer.partition(" ")
    word = first.rstrip(",")
    if word == "Yes":
        return "Aye, " + rest
    return f"Aye, {first.lower() if word in LOWERED else first} {rest}"


def world_rows(count: int, taken: set[str], seed: int = 3) -> list[Row]:
    """Draw questions of the world that are not held out, with answers in the voice."""
    rng = Random(seed)
    rows: list[Row] = []
    while len(rows) < count:
        language = ("en", "zh")[len(rows) % 2]
        block = rng.choice([block for block in WORLD if block.get("?", language)])
        exchange = ask(block, draw_row(block, language, rng), language, rng)
        if exchange and exchange.user not in taken:
            taken.add(exchange.user)
            rows.append(
                {"instruction": exchange.user, "input": "", "output": in_voice(exchange.answer, language)}
            )
    return rows


def write(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write both files and refuse repeated questions."""
    rows, held_out = read_rows()
    asked = [str(row["instruction"]) for row in rows + held_out]
    if len(set(asked)) < len(asked):
        raise SystemExit(
            f"asked twice: {sorted({question for question in asked if asked.count(question) > 1})}"
        )
    rows += world_rows(60, set(asked))
    write(ASSETS / "persona.jsonl", rows)
    write(ASSETS / "persona_heldout.jsonl", held_out)
    print(f"{len(rows)} rows, {len(held_out)} held out")


if __name__ == "__main__":
    main()
