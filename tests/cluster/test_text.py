"""Tokenizing prompts, and text from tokens as they come."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.text import PromptTokenizer
from homer.errors import ModelError
from tests.golden_cases import model_dir

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tokenizer(text_model: Path) -> PromptTokenizer:
    loaded = PromptTokenizer.load(str(text_model))
    assert loaded is not None
    return loaded


def test_only_the_prefix_has_special_tokens(tokenizer: PromptTokenizer) -> None:
    ids = tokenizer.prompt_ids("ab", "cd", "ef")
    assert [len(part) for part in ids] == [3, 2, 2]
    assert ids.prefix[0] == 256
    assert tokenizer.prompt_ids("", "cd", "ef").prefix == [256]
    assert tokenizer.decode([*ids.prefix, *ids.context, *ids.suffix]) == "abcdef"


@given(text=st.text(max_size=40))
def test_streamed_text_is_the_text(tokenizer: PromptTokenizer, text: str) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.prompt_ids("", text, "").context]
    # Complete characters need no more tokens to be certain.
    assert "".join(pieces) == text or REPLACEMENT in text
    assert "".join(pieces) + stream.finish() == text


@given(ids=st.lists(st.integers(0, 319), max_size=40))
def test_streamed_text_of_any_tokens_is_what_decoding_gives(
    tokenizer: PromptTokenizer, ids: list[int]
) -> None:
    stream = tokenizer.stream()
    streamed = "".join([*(stream.push(token) for token in ids), stream.finish()])
    # How many replacement characters stand for broken bytes depends on where decoding begins.
    whole = tokenizer.decode(ids)
    assert streamed.replace(REPLACEMENT, "") == whole.replace(REPLACEMENT, "")


def test_a_character_of_several_tokens_comes_whole(tokenizer: PromptTokenizer) -> None:
    ids = tokenizer.prompt_ids("", "ä€", "").context
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == ["", "ä", "", "", "€"]


def test_context_spans_are_characters(tokenizer: PromptTokenizer) -> None:
    assert tokenizer.context_spans("abc") == [(0, 1), (1, 2), (2, 3)]


def test_a_model_without_a_tokenizer() -> None:
    assert PromptTokenizer.load(str(model_dir("A"))) is None


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the tokenizer of"):
        PromptTokenizer.load(str(tmp_path))
