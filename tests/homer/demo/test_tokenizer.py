"""The demo tokenizer: lossless, one token per word of the demo prose and per digit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from homer.demo import MODEL_DIR, prose, tasks
from homer.demo.tokenizer import BOS, CHAT_TEMPLATE, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(seed=0)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_names_and_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert all(len(encode(tokenizer, f" {place}")) == 1 for place in prose.PLACES)
    pieces = tokenizer.convert_ids_to_tokens(encode(tokenizer, tasks.statement("mill", "40213")))
    assert pieces[-7:-1] == ["Ġ", "4", "0", "2", "1", "3"]


def test_parts_of_a_prompt_can_be_encoded_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = tasks.make_sample("multikey", 300, lambda text: len(encode(tokenizer, text)), seed=5)
    apart = tokenizer(sample.prefix).input_ids
    apart += encode(tokenizer, sample.context) + encode(tokenizer, sample.suffix)
    assert apart == tokenizer(sample.prefix + sample.context + sample.suffix).input_ids
    assert apart[0] == tokenizer.convert_tokens_to_ids(BOS)
    assert len(encode(tokenizer, sample.context)) in range(270, 301)


def test_the_shipped_model_has_the_chat_template_that_training_gives() -> None:
    assert (MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
