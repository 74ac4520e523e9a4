"""The arithmetic task of the demo and the tests: two-operand sums, the rule that checks them, pairs to prefer.

A prompt is a sum such as "37+48=" and its answer is "85", the operands being 0 to 99. Every sum belongs
either to the training part or to the held-out part, in both orders of its operands, so that 48+37 is not held out if
37+48 is trained on. It knows the standard library only; tiny_models.py has the models.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

OPERANDS = 100  # operands are 0 … 99
HELD_OUT_SHARE = 0.1


def is_held_out(a: int, b: int) -> bool:
    """Whether a+b belongs to the held-out part: decided by a hash of the unordered pair, never by a seed.

    >>> is_held_out(37, 48) == is_held_out(48, 37)
    True
    """
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def sums(*, held_out: bool) -> list[tuple[int, int]]:
    """Every (a, b) of one part, ordered: about 9,000 to train on, about 1,000 held out.

    >>> len(sums(held_out=False)) + len(sums(held_out=True))
    10000
    """
    return [(a, b) for a in range(OPERANDS) for b in range(OPERANDS) if is_held_out(a, b) == held_out]


def make_prompts(n: int, *, seed: int, held_out: bool = False) -> list[dict[str, str]]:
    """`n` different records of a prompts file; raises ValueError if the part has fewer sums.

    >>> make_prompts(1, seed=0)
    [{'prompt': '69+99=', 'answer': '168'}]
    """
    part = sums(held_out=held_out)
    if not 0 <= n <= len(part):
        name = "held-out" if held_out else "training"
        raise ValueError(f"{n} prompts asked for, but the {name} part has {len(part)} sums; ask for 0 to {len(part)}")
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in random.Random(seed).sample(part, n)]


def write_prompts(path: Path, n: int, *, seed: int, held_out: bool = False) -> None:
    """Writes `make_prompts(...)` as JSON lines."""
    records = make_prompts(n, seed=seed, held_out=held_out)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def is_correct(completion: str, answer: str) -> bool:
    """The rule: the completion is the answer and nothing else, apart from white space around it.

    >>> is_correct("85", "85"), is_correct("085", "85"), is_correct("85!", "85")
    (True, False, False)
    """
    return completion.strip() == answer


def make_pairs(n: int, *, seed: int, held_out: bool = False) -> list[dict[str, str]]:
    """`n` preference records (prompt, chosen, rejected): the answer over a wrong one, in three of four a near miss."""
    rng = random.Random(seed)
    pairs = []
    for record in make_prompts(n, seed=seed, held_out=held_out):
        wrong = near_miss if rng.random() < 0.75 else wrong_answer
        pairs.append({"prompt": record["prompt"], "chosen": record["answer"], "rejected": wrong(record["answer"], rng)})
    return pairs


def near_miss(answer: str, rng: random.Random) -> str:
    """A wrong number near the right one: mostly one digit changed, often by one; or a lost carry."""
    while True:
        place = rng.randrange(len(answer))
        digit = int(answer[place]) + rng.choice([-1, -1, 1, 1, rng.randrange(10)])
        wrong = answer[:place] + str(digit % 10) + answer[place + 1 :]
        if rng.random() < 0.2:
            wrong = str(abs(int(answer) + rng.choice([-100, -11, -10, -9, -1, 1, 9, 10, 11, 100])))
        if not is_correct(wrong, answer):
            return wrong


def wrong_answer(answer: str, rng: random.Random) -> str:
    """Any answer that the rule refuses: another number, the right one with additions or omissions, or not a number."""
    while True:
        digits = "".join(rng.choices("0123456789", k=rng.randint(1, 8)))
        text = "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randint(0, 8)))
        wrong = rng.choice(
            [
                str(rng.randrange(2 * OPERANDS - 1)),
                digits,
                text,
                "",
                answer + rng.choice([digits, text, " " + digits, answer]),
                rng.choice([digits, text, "0"]) + answer,
                answer[:-1],
            ]
        )
        if not is_correct(wrong, answer):
            return wrong
