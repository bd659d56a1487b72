"""How chats and plain prompts are cut: the template's own tokens, in the parts one expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.http.bodies import Message
from cluster.http.chat import PromptBuilder
from cluster.http.errors import HttpError
from cluster.text import PromptTokenizer
from homer.demo import MODEL_DIR
from homer.errors import PromptError

CHUNK = 64
DOCUMENT = "The fox is red. " * 20


@pytest.fixture(scope="module")
def tokenizer(text_model: Path) -> PromptTokenizer:
    loaded = PromptTokenizer.load(str(text_model))
    assert loaded is not None
    return loaded


def cut(tokenizer: PromptTokenizer, *messages: tuple[str, Any]) -> tuple[str, str, str]:
    """The three parts as text, after a look that together they are what the template gives."""
    turns = [Message(role=role, content=content) for role, content in messages]  # type: ignore[arg-type]
    ids = PromptBuilder(tokenizer, CHUNK).chat(turns, {}).ids
    whole = tokenizer.render_chat(
        [{"role": turn.role, "content": "\n".join(turn.parts)} for turn in turns], {}
    )
    assert [*ids.prefix, *ids.context, *ids.suffix] == tokenizer.ids_and_spans(whole)[0]
    decode = tokenizer._tokenizer.decode
    parts = decode(ids.prefix), decode(ids.context), decode(ids.suffix)
    assert "".join(parts) == whole
    return parts


def test_a_chat_brings_variables_of_the_template_and_no_template(
    tokenizer: PromptTokenizer,
) -> None:
    turns = [{"role": "user", "content": "Who?"}]
    assert tokenizer.render_chat(turns, {"enable_thinking": False}).endswith("Who?\na:")
    for name in ("chat_template", "tokenize", "add_generation_prompt", "tools"):
        with pytest.raises(PromptError, match=f"chat_template_kwargs has {name}; it takes"):
            tokenizer.render_chat(turns, {name: "{{ 'a' * 10 }}"})


def test_system_is_prefix_and_what_the_last_paragraph_says_is_the_question(
    tokenizer: PromptTokenizer,
) -> None:
    parts = cut(tokenizer, ("system", "Be kind."), ("user", f"{DOCUMENT}\n\nWho is red?"))
    assert parts == ("<s>s:Be kind.\nu:", DOCUMENT.rstrip() + " ", "\n\nWho is red?\na:")


@pytest.mark.parametrize(
    ("content", "question"),
    [
        ([{"type": "text", "text": DOCUMENT}, {"type": "text", "text": "A.\n\nB?"}], "\nA.\n\nB?"),
        (f"{DOCUMENT}\nWho is red?\n", "\nWho is red?"),
        (f"{DOCUMENT}And who is it?", " And who is it?"),
        # A paragraph that is too long for a question: its last sentence.
        (f"First.\n\n{DOCUMENT}And who?", " And who?"),
    ],
)
def test_where_the_question_begins(tokenizer: PromptTokenizer, content: Any, question: str) -> None:
    _, context, suffix = cut(tokenizer, ("user", content))
    assert suffix.removesuffix("\na:") == question
    assert context.startswith(("The fox", "First."))


def test_a_short_question_is_one_whole_and_earlier_turns_are_the_document(
    tokenizer: PromptTokenizer,
) -> None:
    prefix, context, suffix = cut(
        tokenizer,
        ("user", DOCUMENT + "Who?"),
        ("assistant", "The fox."),
        ("user", "  Why?\n\nSo? "),
    )
    assert prefix == "<s>u:"
    assert context.startswith("The fox is red.")
    assert context.endswith("a:The fox.\nu:")
    assert suffix == "Why?\n\nSo?\na:"


def test_a_chat_that_is_nothing_but_a_question_is_answered_too(tokenizer: PromptTokenizer) -> None:
    assert cut(tokenizer, ("user", "Hello?")) == ("", "<s>u:", "Hello?\na:")


def test_a_long_system_prompt_is_a_part_of_the_document(tokenizer: PromptTokenizer) -> None:
    prefix, context, suffix = cut(tokenizer, ("system", DOCUMENT), ("user", "Who?"))
    assert prefix == ""
    assert context == f"<s>s:{DOCUMENT.strip()}\nu:"
    assert suffix == "Who?\na:"


def test_what_cannot_be_cut_is_refused(tokenizer: PromptTokenizer) -> None:
    for messages, problem in (
        ([("user", "x" * 400)], "no question was found"),
        ([("user", "  ")], "the question is empty"),
        ([("user", "Hi"), ("assistant", "Hi")], "the last message must be the user's"),
    ):
        with pytest.raises(HttpError, match=problem):
            cut(tokenizer, *messages)


def test_a_completion_is_cut_by_its_marks_or_by_the_same_rule(tokenizer: PromptTokenizer) -> None:
    builder = PromptBuilder(tokenizer, CHUNK)
    by_rule = builder.completion(f"{DOCUMENT}\n\nWho is red?", None, None)
    assert by_rule.ids == tokenizer.prompt_ids("", DOCUMENT, "\n\nWho is red?")
    marked = builder.completion(DOCUMENT, "Read:", "Who?")
    assert marked.ids == tokenizer.prompt_ids("Read:", DOCUMENT, "Who?")


def test_the_demo_model_takes_chats() -> None:
    tokenizer = PromptTokenizer.load(str(MODEL_DIR))
    assert tokenizer is not None
    chat = [Message(role="system", content="Here is a text."), Message(role="user", content="Who?")]
    ids = PromptBuilder(tokenizer, 256).chat(chat, {}).ids
    assert [*ids.prefix, *ids.context, *ids.suffix] == [
        *tokenizer.prompt_ids("Here is a text.\n", "", "Who?").prefix,
        *tokenizer.prompt_ids("", "", "Who?").suffix,
    ]
