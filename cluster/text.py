"""Text to token ids and back, by one rule.

The prefix is tokenized with the tokenizer's special tokens (so the beginning-of-sequence token,
where the model has one, comes first and is there even when the prefix is empty), context and suffix
without. Each part is tokenized on its own. Knows nothing about models or requests.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from homer.errors import ModelError, PromptError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def leave_out_torch() -> None:
    """Let this process load tokenizers without torch, which transformers imports where it can.

    For processes that hold no tensors: it saves them seconds and a quarter of a gigabyte. Where
    torch is loaded already nothing changes.
    """
    # With None there, Python does not find a module, and transformers does without.
    modules: dict[str, Any] = sys.modules
    modules.setdefault("torch", None)
    # transformers would say that it has no torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


class PromptIds(NamedTuple):
    """The token ids of a prompt's three parts."""

    prefix: list[int]
    context: list[int]
    suffix: list[int]


class LocatedText(NamedTuple):
    """A text, and where each of its tokens starts and ends in it, in characters."""

    text: str
    starts: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of(cls, text: str, spans: Sequence[tuple[int, int]]) -> LocatedText:
        return cls(text, [start for start, _ in spans], [end for _, end in spans])


class PromptTokenizer:
    """A model's own tokenizer, as `transformers` loads it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, model: str, **hub: Any) -> PromptTokenizer | None:
        """The tokenizer of a model; None where a model folder has none.

        `hub` is as `LoadOptions.hub` gives it.

        Raises
        ------
        ModelError
            When there is one, but it cannot be loaded.
        """
        folder = Path(model)
        if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(model, **hub))
        # Some want a library that is not there.
        except (ImportError, OSError, ValueError) as error:
            raise ModelError(f"cannot load the tokenizer of {model!r}: {error}") from error

    def prompt_ids(self, prefix: str, context: str, suffix: str) -> PromptIds:
        """Tokenize a prompt."""
        return PromptIds(
            self._ids(prefix, special=True),
            self._ids(context, special=False),
            self._ids(suffix, special=False),
        )

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text, without special tokens."""
        return len(self._ids(text, special=False))

    def locate(self, context: str) -> LocatedText | None:
        """Where the tokens of a context are; None where the tokenizer does not tell."""
        if not self._tokenizer.is_fast:
            return None
        return LocatedText.of(context, self.context_spans(context))

    def context_spans(self, context: str) -> list[tuple[int, int]]:
        """Start and end, in characters, of each context token."""
        encoded = self._tokenizer(
            context, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [(start, end) for start, end in encoded["offset_mapping"]]

    def ids_and_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text`, without special tokens of the tokenizer's own, and start and end of
        each in characters.
        """
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return encoded["input_ids"], encoded["offset_mapping"]

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]
    ) -> str:
        """The text of a chat by the model's own template, up to where its answer begins.

        Raises
        ------
        PromptError
            When the model has no chat template, or its template refuses these messages; or when
            `template_kwargs` has more than variables of the template.
        """
        if not self.has_chat_template:
            raise PromptError(
                "the model has no chat template, so it answers no chats; use completions, or put "
                "its chat_template.jinja beside it"
            )
        # Among them are the template itself, which is a program, and what comes out.
        own = inspect.signature(self._tokenizer.apply_chat_template).parameters.keys()
        if wrong := sorted(own & template_kwargs.keys()):
            raise PromptError(
                f"chat_template_kwargs has {', '.join(wrong)}; it takes variables of the model's "
                "chat template and nothing else: leave that out"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **template_kwargs
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise PromptError(f"the model's chat template refuses this chat: {error}") from error
        return text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def spell(self, token_id: int) -> str:
        """One token alone as text, special tokens too."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def stream(self) -> TextStream:
        """Decodes tokens one by one."""
        return TextStream(self)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        # Not verbose: a document longer than the model's window is what we are for.
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)[
            "input_ids"
        ]
        return ids


class TextStream:
    """Gives the text that becomes certain with each token; all pieces together are the whole text.

    A token may be a part of a character, and its spelling may depend on the token before it. So a
    few tokens before the new ones are decoded along, and text is held back while its last character
    is incomplete.
    """

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0
        self._told = 0

    def push(self, token_id: int) -> str:
        """Take the next token; returns new text, often one word, sometimes nothing."""
        self._ids.append(token_id)
        return self._take(final=False)

    def finish(self) -> str:
        """What was held back when no more tokens come."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._known : self._told])
        text = self._tokenizer.decode(self._ids[self._known :])
        if len(text) <= len(before) or (text.endswith(_REPLACEMENT) and not final):
            return ""
        self._known, self._told = self._told, len(self._ids)
        return text[len(before) :]
