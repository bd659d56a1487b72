"""How a chat, or a plain prompt, becomes prefix, context and question. One rule:

1. The leading system messages, with all that the model's chat template puts around them, are the
   prefix: they are before every chunk of the document. A system prompt that is longer than a
   quarter of a chunk is part of the document instead.
2. The question is at the end of the last user turn. Where the turn's content is a list of parts, it
   is the last part. Where it is one string: all of it if it is at most a quarter of a chunk long;
   else what follows its last blank line, line break or end of a sentence, the first of these that
   leaves at most a quarter of a chunk. With it goes what the template puts behind.
3. All else is the context: earlier turns, and documents.

The text is exactly what the template gives for the whole chat, and it is tokenized as a whole and
then cut: a prompt that fits in one chunk is, token for token, what the plain model would get. Knows
nothing about HTTP.
"""

from __future__ import annotations

import bisect
import re
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from cluster.http.bodies import Message
from cluster.http.errors import HttpError
from cluster.text import LocatedText, PromptIds, PromptTokenizer

_SYSTEM = ("system", "developer")
# Of a chunk, for the prefix and for the question.
SHARE = 4
PART_SEPARATOR = "\n"
# Marks the two cuts while a template runs. Private use: no text has it.
_CONTEXT, _QUESTION = "\ue0f0\ue0f1", "\ue0f2\ue0f3"
_SEPARATORS = tuple(re.compile(p) for p in (r"\n[ \t\r]*\n", r"\n", r"(?<=[.!?])\s+"))


class Prompt(NamedTuple):
    """A prompt, and where it was asked for its context as text.

    Characters of a chat's context count from the first message that is not the system's.
    """

    ids: PromptIds
    document: LocatedText | None = None


class PromptBuilder:
    """Makes prompts with one model's tokenizer and chat template.

    Parameters
    ----------
    tokenizer : PromptTokenizer
    chunk_len : int
        Tokens of a chunk, of which prefix and question may each take a quarter.
    """

    def __init__(self, tokenizer: PromptTokenizer, chunk_len: int) -> None:
        self._tokenizer = tokenizer
        self._most = max(1, chunk_len // SHARE)

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._tokenizer.has_chat_template

    def chat(
        self,
        messages: Sequence[Message],
        template_kwargs: dict[str, Any],
        located: bool = False,
    ) -> Prompt:
        """The prompt of a chat; `located` asks for its document.

        Raises
        ------
        HttpError
            When the model has no chat template, or the chat no question.
        """
        if messages[-1].role != "user":
            raise HttpError(400, "the last message must be the user's question", param="messages")
        turns = [message.model_dump(exclude={"content"}) for message in messages]
        for turn, message in zip(turns, messages, strict=True):
            turn["content"] = PART_SEPARATOR.join(message.parts)
            if _CONTEXT in turn["content"] or _QUESTION in turn["content"]:
                raise HttpError(400, "a message has characters for private use U+E0F0 to U+E0F3")
        plain = self._render(turns, template_kwargs)
        systems = next(n for n, turn in enumerate(turns) if turn["role"] not in _SYSTEM)
        cut = self._question_start(messages[-1])
        last = turns[-1]["content"]
        marked = [dict(turn) for turn in turns]
        marked[-1]["content"] = last[:cut] + _QUESTION + last[cut:]
        marked[systems]["content"] = _CONTEXT + marked[systems]["content"]
        ends = self._marks(self._render(marked, template_kwargs), plain)
        if ends is None:
            # A template that trims a message where a mark now protects it from that.
            marked[-1]["content"] = last[:cut].lstrip() + _QUESTION + last[cut:].strip()
            marked[systems]["content"] = (
                _CONTEXT + marked[systems]["content"].removeprefix(_CONTEXT).strip()
            )
            ends = self._marks(self._render(marked, template_kwargs), plain)
        if ends is None:
            raise HttpError(
                400,
                "the model's chat template changes the text of messages, so Homer cannot tell "
                "document and question apart in it; use /v1/completions",
            )
        return self._cut(plain, *ends, located)

    def completion(
        self, prompt: str, prefix: str | None, question: str | None, located: bool = False
    ) -> Prompt:
        """The prompt of a completion: by its marked parts, or the question by rule 2."""
        if question is None:
            cut = self._cut_of(prompt)
            prompt, question = prompt[:cut], prompt[cut:]
        given = self._tokenizer.prompt_ids(prefix or "", prompt, question)
        ids = self._with_context(given)
        document = None
        if located and ids.context == given.context:
            document = self._tokenizer.locate(prompt)
        return Prompt(ids, document)

    def _render(self, turns: Sequence[dict[str, Any]], template_kwargs: dict[str, Any]) -> str:
        return self._tokenizer.render_chat(turns, template_kwargs)

    def _question_start(self, message: Message) -> int:
        if isinstance(message.content, str):
            return self._cut_of(message.content)
        before = message.parts[:-1]
        return len(PART_SEPARATOR.join(before))

    def _cut_of(self, text: str) -> int:
        """Where the question begins in one string; what separates it is a part of it."""
        if not text.strip():
            raise HttpError(400, "the question is empty")
        if self._fits(text):
            return 0
        stripped = len(text.rstrip())
        for separator in _SEPARATORS:
            # Only the last: a long document may have millions.
            found = deque(separator.finditer(text, 0, stripped), maxlen=1)
            if found and self._fits(text[found[-1].start() :]):
                return found[-1].start()
        raise HttpError(
            400,
            f"no question was found at the end of the prompt: its last paragraph, line and "
            f"sentence are all longer than {self._most} tokens, a quarter of a chunk; put the "
            "question into a content part, or a paragraph, of its own",
        )

    def _fits(self, text: str) -> bool:
        # No tokenizer makes fewer than a token of so many characters of a question.
        return len(text) <= 64 * self._most and self._tokenizer.count_tokens(text) <= self._most

    def _with_context(self, ids: PromptIds) -> PromptIds:
        """`ids` with a document: a short chat may be nothing but its question."""
        prefix, context, suffix = ids
        if len(prefix) > self._most or not context:
            prefix, context = [], prefix + context
        if not context:
            context, suffix = suffix[:-1], suffix[-1:]
        return PromptIds(prefix, context, suffix)

    @staticmethod
    def _marks(marked: str, plain: str) -> tuple[int, int] | None:
        """Where the two cuts are in `plain`; None where the marks changed more than that."""
        context, question = marked.find(_CONTEXT), marked.find(_QUESTION)
        if context < 0 or question < context:
            return None
        if marked.replace(_CONTEXT, "", 1).replace(_QUESTION, "", 1) != plain:
            return None
        return context, question - len(_CONTEXT)

    def _cut(self, text: str, context_start: int, question_start: int, located: bool) -> Prompt:
        ids, spans = self._tokenizer.ids_and_spans(text)
        starts = [start for start, _ in spans]
        first = bisect.bisect_left(starts, context_start)
        second = max(first, bisect.bisect_left(starts, question_start))
        prompt = self._with_context(PromptIds(ids[:first], ids[first:second], ids[second:]))
        if not located:
            return Prompt(prompt)
        first = len(prompt.prefix)
        # What the template puts before the first message is no part of the document.
        places = [
            (max(0, start - context_start), max(0, end - context_start))
            for start, end in spans[first : first + len(prompt.context)]
        ]
        return Prompt(prompt, LocatedText.of(text[context_start:], places))
