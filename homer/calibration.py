"""Measures the calibration bias: the mean significance of ordinary text at each distance, per
layer.

A token near the question scores higher than one far away whatever it says; what is left after the
mean is subtracted is what the token says. Knows nothing about trees.

Reference: HOMER, arXiv 2404.10308, section 3.2 and appendix (about 100 text segments; the authors
ship files and no code).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from homer.attention import NodePass
from homer.errors import PromptError
from homer.stack import LayerStack


@torch.inference_mode()
def chunk_scores(stack: LayerStack, chunk: torch.Tensor, prefix_ids: torch.Tensor) -> torch.Tensor:
    """Scores of one chunk by distance, in every layer.

    The last token of the chunk stands for the question.

    Parameters
    ----------
    stack : LayerStack
    chunk : torch.Tensor of shape (chunk_len,), integer
        Token ids of ordinary text.
    prefix_ids : torch.Tensor of shape (n,), integer
        Put before the chunk, as in use (a beginning-of-sequence token, say); not measured itself.

    Returns
    -------
    torch.Tensor of shape (num_layers, chunk_len), float32, on the CPU
        Distances from 0, the last token itself, to chunk_len - 1.
    """
    front = stack.check_ids("prefix_ids", prefix_ids)
    ids = torch.cat((front, stack.check_ids("chunk", chunk)))
    rows: dict[int, torch.Tensor] = {}

    def keep(layer: int, scores: torch.Tensor) -> None:
        rows[layer] = scores[len(front) :].flip(0).float().cpu()

    positions = torch.arange(len(ids), device=stack.device)
    node_pass = NodePass(span=len(ids), on_scores=keep, keep_kv=False)
    stack.run(stack.embed(ids), positions, range(stack.num_layers), node_pass)
    return torch.stack([rows[layer] for layer in range(stack.num_layers)])


class MeanScores:
    """The mean over chunks that come one by one: in float64, so that only their order counts.

    `total` is the sum so far, of shape (num_layers, chunk_len), over `chunks` chunks.
    """

    def __init__(self, num_layers: int, chunk_len: int) -> None:
        self.total = torch.zeros(num_layers, chunk_len, dtype=torch.float64)
        self.chunks = 0

    def add(self, scores: torch.Tensor) -> None:
        """Add the scores of the next chunk, as `chunk_scores` gives them."""
        self.total += scores
        self.chunks += 1

    @property
    def mean(self) -> torch.Tensor:
        """Shape (num_layers, chunk_len), float32."""
        return (self.total / self.chunks).float()


def measure_bias(
    stack: LayerStack, chunks: Sequence[torch.Tensor], prefix_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """The bias over `chunks` of ordinary text, in this process.

    Parameters
    ----------
    stack : LayerStack
    chunks : sequence of torch.Tensor of shape (chunk_len,), integer
        Token ids, all of one length.
    prefix_ids : torch.Tensor of shape (n,), optional
        As in `chunk_scores`.

    Returns
    -------
    torch.Tensor of shape (num_layers, chunk_len), float32
        The largest distance is chunk_len - 1.

    Raises
    ------
    PromptError
        When there are no chunks, or of several lengths.
    """
    lengths = {len(chunk) for chunk in chunks}
    if len(lengths) != 1 or 0 in lengths:
        raise PromptError(
            f"calibration needs chunks of one length, not of {sorted(lengths) or 'none'}; give "
            f"more text or a shorter chunk length"
        )
    if prefix_ids is None:
        prefix_ids = torch.tensor([], dtype=torch.int64)
    scores = MeanScores(stack.num_layers, lengths.pop())
    for chunk in chunks:
        scores.add(chunk_scores(stack, chunk, prefix_ids))
    return scores.mean


def cut_chunks(ids: torch.Tensor, chunk_len: int, samples: int) -> list[torch.Tensor]:
    """At most `samples` chunks of `chunk_len` tokens, spread evenly over `ids` of shape (n,).

    Raises
    ------
    PromptError
        When the text is shorter than one chunk.
    """
    last_start = len(ids) - chunk_len
    if last_start < 0:
        raise PromptError(
            f"the text has {len(ids)} tokens, but one calibration chunk takes {chunk_len}; give "
            f"more text "
            "or a shorter chunk length"
        )
    # Where the text is short, chunks would only repeat each other: none starts in the first half of
    # another.
    samples = max(1, min(samples, 1 + 2 * last_start // chunk_len))
    step = last_start / max(1, samples - 1)
    return [ids[int(i * step) : int(i * step) + chunk_len] for i in range(samples)]
