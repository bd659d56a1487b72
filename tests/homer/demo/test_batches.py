"""Training batches show the model what the tree will show it, and never more."""

from __future__ import annotations

import pytest
import torch

from homer.demo import tasks
from homer.demo.batches import IGNORE, Batch, BatchMaker, Stage
from homer.demo.tokenizer import make_tokenizer


def stage(*chunks: int) -> Stage:
    return Stage(1, 6, 96, 320, keys=5, questions=4, chunks=chunks, guide=0.0)


@pytest.fixture(scope="module")
def maker() -> BatchMaker:
    return BatchMaker(make_tokenizer(0), seed=0)


@pytest.fixture(scope="module", params=[1, 2, 4])
def drawn(maker: BatchMaker, request: pytest.FixtureRequest) -> tuple[int, Batch]:
    return request.param, maker.draw(stage(request.param))


def test_questions_are_answered_with_the_key_that_is_stated(
    maker: BatchMaker, drawn: tuple[int, Batch]
) -> None:
    _, batch = drawn

    def decode(ids: torch.Tensor | list[int]) -> str:
        return str(maker.tokenizer.decode(ids))

    answered = 0
    for row in range(batch.ids.shape[0]):
        text = decode(batch.ids[row, batch.context])
        for asking, needle, judged in zip(
            batch.asking[row], batch.needle[row], batch.judged[row], strict=True
        ):
            labels = batch.labels[row, asking : asking + tasks.KEY_DIGITS + 3].tolist()
            start = int(asking) + 1
            prompt = decode(batch.ids[row, start - 16 : start])
            name = prompt.rpartition("? The ")[2].removesuffix(" is")
            assert judged == needle.any()
            if labels[0] == IGNORE:
                continue
            answered += 1
            *digits, end = labels
            assert end == maker.tokenizer.eos_token_id
            assert f"{name.split()[-1]} is{decode(digits[:-1])}" in text
            copied = batch.ids[row, batch.read_from[row, asking : asking + len(digits) - 1]]
            assert copied.tolist() == digits[:-1]
            wanted = decode(batch.ids[row, batch.context][needle])
            assert wanted.endswith(decode(digits).rstrip("."))
    assert answered > 5


def test_no_slot_sees_the_future_another_chunk_or_another_question(
    drawn: tuple[int, Batch],
) -> None:
    chunks, batch = drawn
    n = batch.context.stop - batch.context.start
    p, length, block = (
        batch.context.start,
        n // chunks,
        (batch.ids.shape[1] - batch.context.stop) // 4,
    )
    for mask in (batch.low[:, 0], batch.high[:, 0]):
        assert not mask.triu(1).any()
        assert mask.diagonal(dim1=1, dim2=2).all()
        assert mask[:, :, :p].tril().any()
        for question in range(1, 4):
            start = batch.context.stop + question * block
            assert not mask[:, start : start + block, batch.context.stop : start].any()
    for chunk in range(1, chunks):
        start = p + chunk * length
        assert not batch.low[:, 0, start : start + length, p:start].any()
        assert batch.high[:, 0, start : start + length, p:start].any()


def test_chunks_share_one_range_of_positions_and_questions_come_after(
    drawn: tuple[int, Batch],
) -> None:
    chunks, batch = drawn
    n = batch.context.stop - batch.context.start
    for row in batch.positions:
        pieces = row[batch.context].reshape(chunks, n // chunks)
        assert (pieces.diff(dim=1) == 1).all()
        assert pieces.max() < row[batch.context.stop] < 320
        assert row[: batch.context.start].tolist() == list(range(batch.context.start))


def test_what_must_survive_is_always_visible_above_the_merge(drawn: tuple[int, Batch]) -> None:
    _, batch = drawn
    for row in range(batch.ids.shape[0]):
        for asking, needle in zip(batch.asking[row], batch.needle[row], strict=True):
            assert batch.high[row, 0, asking, batch.context][needle].all()


def test_equal_seeds_draw_equal_batches(maker: BatchMaker) -> None:
    first, second = (BatchMaker(maker.tokenizer, 7).draw(stage(2)) for _ in range(2))
    other = BatchMaker(maker.tokenizer, 8).draw(stage(2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.high, second.high)
    assert not torch.equal(first.ids, other.ids)


def test_some_rows_begin_like_a_document_and_some_with_the_key(maker: BatchMaker) -> None:
    starts = [
        str(maker.tokenizer.decode(row[batch.context]))
        for batch in (maker.draw(stage(1)) for _ in range(30))
        for row in batch.ids
    ]
    at_sentence = [text for text in starts if text[0].isupper()]
    with_key = [text for text in at_sentence if text.startswith(("The pass key is", "The key of"))]
    assert 0.3 * len(starts) < len(at_sentence) < 0.5 * len(starts)
    assert 0.4 * len(at_sentence) < len(with_key) < 0.8 * len(at_sentence)
