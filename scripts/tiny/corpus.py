"""Generate Tiny's bilingual chat corpus: endless dialogues from a seed, and the held-out prompts.

Run ``python scripts/tiny/corpus.py`` to print dialogues, with ``--heldout FILE`` to write held-out prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from blocks import MEMORY, SLOTS, TALK, Block, Exchange, ask, draw_row, draw_value, share, slot_question
from tables import FRAMES

Message = dict[str, str]

CARD_SLOTS = [slot for slot in SLOTS if "@" in slot.lines]
UNLIKE = {"to_chinese", "to_english", "day_zh", "month_nth"}  # these ask another thing in the other language
SMALL = [block for block in TALK if block.table == "-"]
WORLD = [block for block in TALK if block.table != "-"]
TABLE_WEIGHTS = {
    "dict": 7.0,
    "sums": 4.0,
    "minus": 3.0,
    "mixed": 3.0,
    "countries": 2.0,
    "words": 3.0,
    "opposites2": 1.5,
    "numbers_next": 1.5,
    "phrases_en": 4.0,
    "phrases_zh": 4.0,
}
WEIGHTS = [TABLE_WEIGHTS.get(block.table, 1.0) for block in WORLD]
MAKERS_WEIGHTS = {"chain": 48, "card": 12, "memory": 12, "follow": 6, "cross": 5, "one_word": 4}


def dialogue(system: str, exchanges: list[Exchange]) -> list[Message]:
    """Lay out exchanges as chat messages."""
    messages = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.user})
        messages.append({"role": "assistant", "content": exchange.answer})
    return messages


def random_language(rng: Random) -> str:
    """Toss a coin between English and Chinese."""
    return rng.choice(("en", "zh"))


def draw_block(language: str, rng: Random, world: float = 0.6, personal: float = 0.25) -> Block:
    """Draw a block of the world, a personal slot or small talk."""
    while True:
        pick = rng.random()
        if pick < world:
            block = rng.choices(WORLD, WEIGHTS)[0]
        else:
            block = rng.choice(SLOTS if pick < world + personal else SMALL)
        if block.get("?", language):
            return block


def draw_exchange(language: str, rng: Random, held_out: bool = False) -> Exchange:
    """Draw an exchange from any block, on the wanted side of the held-out line."""
    while True:
        block = draw_block(language, rng)
        exchange = ask(block, draw_row(block, language, rng), language, rng, held_out)
        if exchange:
            return exchange


def some_system(language: str, rng: Random) -> str:
    """Return a general system prompt, or none at all most of the time."""
    return rng.choice(FRAMES["system", language]) if rng.random() < 0.25 else ""


def chain(rng: Random, language: str) -> list[Message]:
    """Unrelated exchanges one after the other; now and then the language changes."""
    exchanges = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4, 5))):
        turn_language = language if rng.random() < 0.88 else random_language(rng)
        exchanges.append(draw_exchange(turn_language, rng))
    return dialogue(some_system(language, rng), exchanges)


def make_card(rng: Random, language: str) -> tuple[str, dict[str, str]]:
    """Write a role card: the system prompt and the value of every slot on it."""
    slots = rng.sample(CARD_SLOTS[1:], rng.randint(1, 5))
    slots.insert(0 if rng.random() < 0.8 else rng.randint(0, len(slots)), CARD_SLOTS[0])
    values = {slot.name: draw_value(slot, language, rng) for slot in slots}
    parts = [rng.choice(slot.get("@", language)).format(v=values[slot.name]) for slot in slots]
    if rng.random() < 0.4:
        parts.append(rng.choice(FRAMES["card_end", language]))
    return (" " if language == "en" else "").join(parts), values


def card_exchange(values: dict[str, str], language: str, rng: Random) -> Exchange:
    """Ask the owner of a card: mostly what the card states, else something it does not, or the world."""
    pick = rng.random()
    if pick > 0.88:
        return draw_exchange_of(WORLD, language, rng)
    if pick > 0.8:
        slot = rng.choice([slot for slot in CARD_SLOTS if slot.name not in values])
        answer = FRAMES["not_on_card", language][0]
    else:
        slot = rng.choice([slot for slot in CARD_SLOTS if slot.name in values])
        answer = rng.choice(slot.get("!", language)).format(v=values[slot.name])
    return Exchange(slot_question(slot, language, rng), answer)


def draw_exchange_of(blocks: list[Block], language: str, rng: Random) -> Exchange:
    """Draw a training exchange from some of the blocks."""
    while True:
        block = rng.choice(blocks)
        if block.get("?", language):
            exchange = ask(block, draw_row(block, language, rng), language, rng)
            if exchange:
                return exchange


def card(rng: Random, language: str) -> list[Message]:
    """Talk to the owner of a role card."""
    system, values = make_card(rng, language)
    count = rng.randint(2, 6)
    return dialogue(system, [card_exchange(values, language, rng) for _ in range(count)])


def memory(rng: Random, language: str) -> list[Message]:
    """Users tell about themselves, talk of something else, and ask what they told (or never told)."""
    told = rng.sample(MEMORY, rng.randint(1, 2))
    exchanges, questions = [], []
    for block in told:
        value = draw_value(block, language, rng)
        say = rng.choice(block.get("@", language)).format(v=value)
        react = block.get("+", language)[0].format(v=value)
        exchanges.append(Exchange(say, react[0].upper() + react[1:]))
        question = slot_question(block, language, rng)
        questions.append(Exchange(question, block.get("!", language)[0].format(v=value)))
    exchanges += [draw_exchange(language, rng) for _ in range(rng.randint(0, 2))]
    if rng.random() < 0.2:
        block = rng.choice([block for block in MEMORY if block not in told])
        question = slot_question(block, language, rng)
        questions.append(Exchange(question, block.get("=", language)[0]))
    rng.shuffle(questions)
    return dialogue(some_system(language, rng), exchanges + questions)


def follow(rng: Random, language: str) -> list[Message]:
    """Ask a question, then shorter ones that lean on it."""
    block = rng.choice([block for block in TALK if block.get("&", language)])
    first = None
    while not first:
        first = ask(block, draw_row(block, language, rng), language, rng)
    exchanges = [first]
    for _ in range(rng.randint(1, 3)):
        row = draw_row(block, language, rng)
        user = rng.choice(block.get("&", language)).format(**row)
        exchanges.append(Exchange(user, block.get("=", language)[0].format(**row)))
    return dialogue(some_system(language, rng), exchanges)


def cross(rng: Random, language: str) -> list[Message]:
    """Let a system prompt set the language of the answers, whatever that of the questions."""
    blocks = [
        block for block in TALK if block.get("?", "en") and block.get("?", "zh") and block.name not in UNLIKE
    ]
    exchanges = []
    while len(exchanges) < rng.randint(1, 3):
        block = rng.choice(blocks)
        row, asked = draw_row(block, language, rng), random_language(rng)
        exchange = ask(block, row, asked, rng)
        if exchange:
            exchanges.append(Exchange(exchange.user, block.get("=", language)[0].format(**row)))
    return dialogue(rng.choice(FRAMES["answer_in", language]), exchanges)


def one_word(rng: Random, language: str) -> list[Message]:
    """Let a system prompt ask for answers of one word."""
    blocks = [block for block in TALK if block.get("~", language)]
    exchanges = []
    while len(exchanges) < rng.randint(1, 3):
        block = rng.choice(blocks)
        row = draw_row(block, language, rng)
        exchange = ask(block, row, language, rng)
        if exchange:
            exchanges.append(Exchange(exchange.user, block.get("~", language)[0].format(**row)))
    return dialogue(rng.choice(FRAMES["one_word", language]), exchanges)


MAKERS = {
    "chain": chain,
    "card": card,
    "memory": memory,
    "follow": follow,
    "cross": cross,
    "one_word": one_word,
}


def dialogues(seed: int) -> Iterator[list[Message]]:
    """Yield training dialogues without end; the same seed gives the same dialogues."""
    rng = Random(seed)
    names, weights = list(MAKERS_WEIGHTS), list(MAKERS_WEIGHTS.values())
    while True:
        made = MAKERS[rng.choices(names, weights)[0]](rng, random_language(rng))
        if not any(is_held_out_dialogue(made[:end]) for end in range(2, len(made) + 1)):
            yield made


def is_held_out_dialogue(messages: list[Message]) -> bool:
    """Keep some dialogues of role cards, memory and follow-ups from training, by the words of the user."""
    text = "\n".join(message["content"] for message in messages if message["role"] != "assistant")
    return len(messages) > 2 and share("dialogue:" + text) < 0.02


def held_out(seed: int, singles: int = 100, others: int = 40) -> list[dict[str, object]]:
    """Draw held-out prompts: single questions, and dialogues that no training run can see."""
    rng = Random(seed)
    prompts: dict[str, dict[str, object]] = {}
    while len(prompts) < singles:
        exchange = draw_exchange(random_language(rng), rng, held_out=True)
        messages = dialogue("", [exchange])
        prompts.setdefault(exchange.user, {"messages": messages[:-1], "answer": exchange.answer})
    while len(prompts) < singles + others:
        maker = rng.choice([card, memory, follow, cross, one_word])
        messages = maker(rng, random_language(rng))
        if len(messages) > 3 and is_held_out_dialogue(messages):
            key = json.dumps(messages[:-1])
            prompts.setdefault(key, {"messages": messages[:-1], "answer": messages[-1]["content"]})
    return list(prompts.values())


def main() -> None:
    """Print sample dialogues, or write the held-out prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--heldout", type=Path)
    args = parser.parse_args()
    if args.heldout:
        lines = [json.dumps(row, ensure_ascii=False) for row in held_out(args.seed)]
        args.heldout.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    stream = dialogues(args.seed)
    for _ in range(args.count):
        for message in next(stream):
            print(f"{message['role']}: {message['content']}")
        print()


if __name__ == "__main__":
    main()
