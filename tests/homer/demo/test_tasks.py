"""The demo texts: readable, repeatable, of the length asked for, with the needle where they say."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homer.demo import prose, tasks
from homer.errors import ConfigError

KEY = re.compile(r"The (?:pass key|key of the \w+) is (\d{5})\.")


def count_words(text: str) -> int:
    """Stands in for a tokenizer: any function that counts will do."""
    return len(text.split())


@settings(max_examples=60)
@given(
    task=st.sampled_from(tasks.TASKS),
    seed=st.integers(0, 10**9),
    length=st.integers(40, 1500),
    keys=st.integers(1, 4),
)
def test_a_sample_states_its_answer_where_it_says(
    task: tasks.Task, seed: int, length: int, keys: int
) -> None:
    sample = tasks.make_sample(task, length, count_words, seed, keys=keys)
    assert count_words(sample.context) <= length
    assert count_words(sample.context) > length - 30
    stated = KEY.findall(sample.context)
    assert len(stated) == (keys if task == "multikey" else 1)
    name = sample.suffix.removeprefix("\nWhat is the ").partition("?")[0]
    assert sample.needle_text == f"The {name} is {sample.answer}."
    assert sample.context.count(sample.needle_text) == 1
    assert sample.suffix.endswith(f"The {name} is")


def test_the_same_seed_gives_the_same_text_and_splits_never_meet() -> None:
    def context(seed: int, split: tasks.Split) -> str:
        return tasks.make_sample("multikey", 200, count_words, seed, split=split).context

    splits: tuple[tasks.Split, ...] = ("train", "test", "demo")
    texts = {(seed, split): context(seed, split) for seed in range(20) for split in splits}
    assert texts == {(seed, split): context(seed, split) for seed, split in texts}
    assert len(set(texts.values())) == len(texts)


def test_needles_stand_anywhere() -> None:
    samples = [tasks.make_sample("passkey", 400, count_words, seed) for seed in range(200)]
    depths = [sample.needle[0] / len(sample.context) for sample in samples]
    for low in (0.0, 0.25, 0.5, 0.75):
        assert 25 <= sum(low <= depth < low + 0.25 for depth in depths) <= 80


def test_filler_is_varied_and_full_of_other_numbers() -> None:
    text = tasks.plain_text(20_000, count_words, seed=1)
    sentences = text.split(". ")
    assert len(set(sentences)) > 0.95 * len(sentences)
    assert len(re.findall(r"\b\d{5}\b", text)) > 100
    assert not KEY.search(text)
    assert tasks.plain_text(20_000, count_words, seed=1) == text
    assert tasks.plain_text(20_000, count_words, seed=2) != text


@pytest.mark.parametrize(
    ("generated", "right"),
    [(" 12345.", True), ("12345", True), ("12345 ", True), ("1234", False), ("12345.6", False)],
)
def test_only_the_exact_answer_is_right(generated: str, right: bool) -> None:
    sample = tasks.Sample("passkey", "test", 0, "", "", "", "12345", (0, 0))
    assert sample.is_right(generated) is right


def test_mistakes_are_told_with_what_to_change() -> None:
    with pytest.raises(ConfigError, match="choose one of passkey, multikey"):
        tasks.make_sample("riddle", 100, count_words, 0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"choose 1 to {len(prose.PLACES)}"):
        tasks.make_sample("multikey", 100, count_words, 0, keys=0)
    with pytest.raises(ConfigError, match="ask for a longer context or for fewer keys"):
        tasks.make_sample("multikey", 10, count_words, 0)
