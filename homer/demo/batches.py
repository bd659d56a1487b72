"""Training batches for the demo model: groups of chunks with questions that look at them.

One row of a batch is a *group*: a prefix, context slots that belong to one or several chunks, and
question blocks side by side that do not see each other. Masks and positions make a row look like
what the model meets later: a plain window (one chunk), leaves (each chunk sees itself, all chunks
share one position range), and merged nodes (survivors of several chunks, most neighbours pruned).
Knows nothing about the model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerFast

from homer.demo import prose, tasks

IGNORE = -100
_POOL_SENTENCES = 20_000
_DOCUMENT_STARTS = 0.4
"""Share of rows whose context is the start of a document; the others begin anywhere."""
_PASS_KEYS = 0.4
"""Share of rows that state a pass key among the keys of places."""


@dataclass(frozen=True)
class Stage:
    """One stretch of the training.

    Attributes
    ----------
    steps, groups
        Optimiser steps, and rows of each batch.
    context_tokens
        Context slots of a row, shared out among its chunks.
    window
        Positions run up to about here: survivors and questions are spread over it.
    keys, questions
        Statements in a row and questions asked on it.
    chunks
        How many chunks a row may have; one of these numbers is drawn for each batch.
    guide
        Weight of the loss that shows two early heads where to look.
    """

    steps: int
    groups: int
    context_tokens: int
    window: int
    keys: int
    questions: int
    chunks: tuple[int, ...]
    guide: float


@dataclass
class Batch:
    """Tensors of one batch: ``b`` rows of ``s`` slots, ``n`` of them context; ``q`` questions.

    ``low`` and ``high`` are attention masks (b, 1, s, s) for the layers before and after the merge;
    ``asking`` (b, q) holds the slot of each question's last token, ``needle`` (b, q, n) the tokens
    that must survive for it, ``judged`` (b, q) whether there are any. ``name_of`` and
    ``read_from`` (b, s) hold, where it makes sense, the slot that a helpful head would look at: the
    name that a key belongs to, and the stated token that an answer copies next.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    labels: torch.Tensor
    text_labels: torch.Tensor
    asking: torch.Tensor
    needle: torch.Tensor
    judged: torch.Tensor
    name_of: torch.Tensor
    read_from: torch.Tensor
    context: slice

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        tensors = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)  # type: ignore[arg-type]


class BatchMaker:
    """Draws batches from one random stream; equal seeds give equal batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.rng = random.Random(f"training/{seed}")
        self.tokenizer = tokenizer
        sentences = [" " + prose.sentence(self.rng) for _ in range(_POOL_SENTENCES)]
        self.pool = tokenizer(sentences, add_special_tokens=False).input_ids
        self.prefix = tokenizer(tasks.PREFIX).input_ids
        self.names: list[str | None] = [None, *prose.PLACES]
        self.questions = {name: self._encode(tasks.question(name)) for name in self.names}
        self.question_len = max(map(len, self.questions.values())) + tasks.KEY_DIGITS + 3

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def draw(self, stage: Stage) -> Batch:
        """The next batch of a stage."""
        chunks = self.rng.choice(stage.chunks)
        rows = [_Row(self, stage, chunks) for _ in range(stage.groups)]
        ids = torch.tensor([row.ids for row in rows])
        p, n = len(self.prefix), rows[0].chunk_len * chunks
        low, high = _masks(rows, p, n, self.question_len)
        return Batch(
            ids=ids,
            positions=torch.tensor([row.positions for row in rows]),
            low=low,
            high=high,
            labels=torch.tensor([row.labels for row in rows]),
            text_labels=torch.tensor([row.text_labels for row in rows]),
            asking=torch.tensor([row.asking for row in rows]),
            needle=torch.tensor([row.needle for row in rows]),
            judged=torch.tensor([[any(hit) for hit in row.needle] for row in rows]),
            name_of=torch.tensor([row.name_of for row in rows]),
            read_from=torch.tensor([row.read_from for row in rows]),
            context=slice(p, p + n),
        )


class _Row:
    """One group, as plain lists."""

    def __init__(self, maker: BatchMaker, stage: Stage, chunks: int) -> None:
        rng = maker.rng
        self.chunk_len = length = stage.context_tokens // chunks
        p, n = len(maker.prefix), length * chunks
        names: list[str | None] = list(rng.sample(prose.PLACES, stage.keys))
        if rng.random() < _PASS_KEYS:
            names[0] = None
        keys = {name: tasks.draw_key(rng) for name in names}
        context, spans = _context(maker, keys, n)
        # Keys cut by the end of a chunk or of the text are stated but not asked about.
        whole = [
            name
            for name, (start, end) in spans.items()
            if start >= 0 and end < n and start // length == end // length
        ]
        # Survivors keep the positions that they had in a chunk of this length.
        leaf_len = max(length, rng.randint(length, stage.window - p - maker.question_len))
        if chunks == 1 and rng.random() < 0.7:
            leaf_len = length
        offsets = [rng.randint(0, leaf_len - length) for _ in range(chunks)]
        self.ids = maker.prefix + context
        self.positions = list(range(p))
        for offset in offsets:
            self.positions += range(p + offset, p + offset + length)
        self.chunk_of = [slot // length for slot in range(n)]
        pruned = 0.0 if chunks == 1 and rng.random() < 0.6 else rng.choice([0.0, 0.4, 0.7, 0.9])
        self.keep = [rng.random() >= pruned for _ in range(n)]
        for start, end in spans.values():
            for slot in range(max(start, 0), min(end + 1, n)):
                self.keep[slot] = True
        self.text_labels = _next_in_chunk(context, length)
        self.labels = [IGNORE] * (p + n)
        self.name_of = [IGNORE] * (p + n)
        self.read_from = [IGNORE] * (p + n)
        for start, end in spans.values():
            for slot in range(max(start + 1, 0), min(end + 1, n)):
                if start >= 0 and start // length == slot // length:
                    self.name_of[p + slot] = p + start
        self.sees: list[int] = []  # per question: -1 for all survivors, else the chunk it runs in
        self.asking: list[int] = []
        self.needle: list[list[bool]] = []
        absent = [name for name in maker.names if name not in keys]
        asked = rng.sample(whole, min(len(whole), stage.questions))
        asked += rng.sample(absent, stage.questions - len(asked))
        for name in asked:
            in_leaf = chunks > 1 and rng.random() < 0.35
            self.sees.append(rng.randrange(chunks) if in_leaf else -1)
            # A question that ran in a leaf only scores; the answer is read by a fresh one.
            key = None if in_leaf else keys.get(name)
            self._ask(maker, name, key, spans.get(name), n, p + leaf_len)

    def _ask(
        self,
        maker: BatchMaker,
        name: str | None,
        key: str | None,
        span: tuple[int, int] | None,
        n: int,
        position: int,
    ) -> None:
        suffix = maker.questions[name]
        block = list(suffix)
        labels = [IGNORE] * (len(suffix) - 1)
        if key is not None:
            answer = maker._encode(f" {key}.")
            block += answer
            labels += [*answer, maker.tokenizer.eos_token_id]
        reads = [IGNORE] * len(block)
        if key is not None and span is not None:
            # From the last token of the question on: the space, then the digits.
            first = len(maker.prefix) + span[0] + 2
            reads[len(suffix) - 1 : len(suffix) + tasks.KEY_DIGITS] = range(
                first, first + tasks.KEY_DIGITS + 1
            )
        padding = maker.question_len - len(block)
        self.asking.append(len(self.ids) + len(suffix) - 1)
        self.ids += block + [maker.tokenizer.pad_token_id] * padding
        self.labels += labels + [IGNORE] * (maker.question_len - len(labels))
        self.name_of += [IGNORE] * maker.question_len
        self.read_from += reads + [IGNORE] * padding
        self.positions += range(position, position + maker.question_len)
        hit = [False] * n
        if span is not None:
            hit[span[0] : span[1] + 1] = [True] * (span[1] + 1 - span[0])
        self.needle.append(hit)


def _context(
    maker: BatchMaker, keys: dict[str | None, str], n: int
) -> tuple[list[int], dict[str | None, tuple[int, int]]]:
    """``n`` tokens of text that begin anywhere, and the slots from each name to its last digit."""
    rng = maker.rng
    stated = {name: maker._encode(" " + tasks.statement(name, key)) for name, key in keys.items()}
    budget = n - sum(map(len, stated.values()))
    pieces: list[list[int]] = []
    while budget > 0:
        pieces.append(rng.choice(maker.pool))
        budget -= len(pieces[-1])
    for tokens in stated.values():
        pieces.insert(rng.randint(0, len(pieces)), tokens)
    begin = rng.randint(0, max(0, -budget))
    if rng.random() < _DOCUMENT_STARTS:
        # The start of a document: no space before the first word, and often the key itself.
        begin = 0
        if rng.random() < 0.5:
            first = stated[rng.choice(list(stated))]
            pieces = [first, *(piece for piece in pieces if piece is not first)]
        unspaced = maker._encode(str(maker.tokenizer.decode(pieces[0]))[1:])
        for name, tokens in stated.items():
            if tokens is pieces[0]:
                stated[name] = unspaced
        pieces[0] = unspaced
    context: list[int] = []
    ends: dict[str | None, int] = {}
    for piece in pieces:
        context += piece
        for name, tokens in stated.items():
            if tokens is piece:
                ends[name] = len(context) - begin
    spans = {
        # A statement ends with its name, "is", a space, the digits and a dot.
        name: (end - tasks.KEY_DIGITS - 4, end - 2)
        for name, end in ends.items()
    }
    return context[begin : begin + n], spans


def _next_in_chunk(context: list[int], length: int) -> list[int]:
    """Next token of each context slot, or ``IGNORE`` at the end of its chunk."""
    following = [*context[1:], IGNORE]
    return [IGNORE if (i + 1) % length == 0 else token for i, token in enumerate(following)]


def _masks(rows: list[_Row], p: int, n: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention masks (b, 1, s, s) before and after the merge."""
    s = len(rows[0].ids)
    slot = torch.arange(s)
    causal = slot[:, None] >= slot[None, :]
    # -1 prefix, 0.. chunk of a context slot, -2 question
    chunk = torch.tensor([-1] * p + rows[0].chunk_of + [-2] * (s - p - n))
    asks = torch.div(slot - p - n, block, rounding_mode="floor")
    is_ctx, is_q = chunk >= 0, chunk == -2
    to_prefix = (chunk == -1)[None, :]
    own_chunk = is_ctx[:, None] & (chunk[:, None] == chunk[None, :])
    own_block = is_q[:, None] & is_q[None, :] & (asks[:, None] == asks[None, :])
    base = to_prefix | own_chunk | own_block
    keep = torch.zeros(len(rows), s, dtype=torch.bool)
    keep[:, p : p + n] = torch.tensor([row.keep for row in rows])
    # What the question of each slot looks at: all survivors (-1) or one whole chunk.
    sees = torch.tensor([row.sees for row in rows])
    sees_slot = torch.full((len(rows), s), -1)
    sees_slot[:, p + n :] = sees.repeat_interleave(block, dim=1)
    from_q = is_q[None, :, None]
    everyone = sees_slot[:, :, None] == -1
    low = base[None] | (
        from_q & torch.where(everyone, keep[:, None, :], sees_slot[:, :, None] == chunk)
    )
    itself = torch.eye(s, dtype=torch.bool)
    merged = (is_ctx | is_q)[None, :, None] & keep[:, None, :]
    high = to_prefix[None] | own_block[None] | merged | itself[None]
    return (low & causal)[:, None], (high & causal)[:, None]
