"""The two demo tasks as texts that a person can read, and ordinary text for calibration.

*Passkey*: one five-digit pass key stands somewhere in a long text. *Multi-key*: the keys of several
places stand in it and the question names one of them. A sample depends on its task, split, seed and
length alone. Knows nothing about models; a tokenizer enters only as a function that counts tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from homer.demo import prose
from homer.errors import ConfigError

Task = Literal["passkey", "multikey"]
Split = Literal["train", "test", "demo"]

TASKS: tuple[Task, ...] = ("passkey", "multikey")
PREFIX = "Here is a text.\n"
KEY_DIGITS = 5
DEFAULT_KEYS = 3


@dataclass(frozen=True)
class Sample:
    """One document with a question about it.

    Attributes
    ----------
    task, split, seed
        What made it.
    prefix, context, suffix : str
        The three parts of the prompt; the prompt is their plain concatenation.
    answer : str
        The five digits that answer the question.
    needle : tuple of int
        Start and end of the statement that holds the answer, in characters of ``context``.
    """

    task: Task
    split: Split
    seed: int
    prefix: str
    context: str
    suffix: str
    answer: str
    needle: tuple[int, int]

    @property
    def needle_text(self) -> str:
        """The statement that holds the answer."""
        return self.context[self.needle[0] : self.needle[1]]

    def is_right(self, generated: str) -> bool:
        """Whether a generated text is the answer: exact match but for space and the final dot."""
        return generated.strip().removesuffix(".") == self.answer


def statement(place: str | None, key: str) -> str:
    """The sentence that states a key: the pass key, or the key of a place."""
    return f"The pass key is {key}." if place is None else f"The key of the {place} is {key}."


def question(place: str | None) -> str:
    """The question for a key, ending where the answer begins."""
    name = "pass key" if place is None else f"key of the {place}"
    return f"\nWhat is the {name}? The {name} is"


def draw_key(rng: random.Random) -> str:
    """A random key: five digits, the first not zero."""
    return str(rng.randint(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS - 1))


def make_sample(
    task: Task,
    context_tokens: int,
    count_tokens: Callable[[str], int],
    seed: int,
    *,
    keys: int = DEFAULT_KEYS,
    split: Split = "test",
) -> Sample:
    """A sample whose context has about ``context_tokens`` tokens, never more.

    Parameters
    ----------
    task
        ``"passkey"`` or ``"multikey"``.
    context_tokens
        Length wished for; the context stops before the first sentence that would pass it.
    count_tokens
        Number of tokens of a text in the tokenizer at hand, without special tokens.
    seed
        Any integer. Splits never share a sample, whatever their seeds.
    keys
        How many keys a multi-key sample states.
    split
        Training draws from ``"train"``, measurements from ``"test"``, the demo from ``"demo"``.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    if task == "multikey" and not 1 <= keys <= len(prose.PLACES):
        raise ConfigError(f"keys is {keys}: choose 1 to {len(prose.PLACES)}")
    rng = random.Random(f"{task}/{split}/{seed}/{context_tokens}/{keys}")
    places: list[str | None] = [None]
    if task == "multikey":
        places = list(rng.sample(prose.PLACES, keys))
    values = [draw_key(rng) for _ in places]
    statements = [statement(place, key) for place, key in zip(places, values, strict=True)]
    used = sum(count_tokens(" " + text) for text in statements)
    if used > context_tokens:
        raise ConfigError(
            f"context_tokens is {context_tokens}, but the statements of the keys alone take "
            f"{used} tokens: ask for a longer context or for fewer keys"
        )
    sentences = _sentences(rng, context_tokens - used, count_tokens)
    # Each statement falls into a random gap between sentences, all gaps equally likely.
    asked = rng.randrange(len(places))
    for text in statements:
        sentences.insert(rng.randint(0, len(sentences)), text)
    at = sentences.index(statements[asked])
    start = len(" ".join(sentences[:at])) + (1 if at else 0)
    return Sample(
        task=task,
        split=split,
        seed=seed,
        prefix=PREFIX,
        context=" ".join(sentences),
        suffix=question(places[asked]),
        answer=values[asked],
        needle=(start, start + len(statements[asked])),
    )


def plain_text(context_tokens: int, count_tokens: Callable[[str], int], seed: int) -> str:
    """Prose without any key, for calibration: at most ``context_tokens`` tokens."""
    rng = random.Random(f"plain/{seed}/{context_tokens}")
    return " ".join(_sentences(rng, context_tokens, count_tokens))


def _sentences(
    rng: random.Random, token_budget: int, count_tokens: Callable[[str], int]
) -> list[str]:
    """Sentences of prose whose tokens, each with a leading space, fit the budget."""
    sentences: list[str] = []
    while True:
        text = prose.sentence(rng)
        token_budget -= count_tokens(" " + text)
        if token_budget < 0:
            return sentences
        sentences.append(text)
