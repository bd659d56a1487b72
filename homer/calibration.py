"""Measures the calibration bias: the mean significance of ordinary text at each distance, per
layer.

A token near the question scores higher than one far away whatever it says; what is left after the
mean is subtracted is what the token says. Knows nothing about trees.

Reference: HOMER, arXiv 2404.10308, section 3.2 and appendix (about 100 text segments; the authors
ship files and no code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from homer.attention import NodePass
from homer.errors import PromptError
from homer.stack import LayerStack


@torch.inference_mode()
def measure_bias(
    stack: LayerStack,
    chunks: Sequence[torch.Tensor],
    prefix_ids: torch.Tensor | None = None,
    on_chunk: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """The bias over `chunks` of ordinary text.

    In every layer the last token of a chunk stands for the question: its scores against the tokens
    before it are averaged at each distance.

    Parameters
    ----------
    stack : LayerStack
    chunks : sequence of torch.Tensor of shape (chunk_len,), integer
        Token ids, all of one length.
    prefix_ids : torch.Tensor of shape (n,), optional
        Put before each chunk, as in use (a beginning-of-sequence token, say); not measured itself.
    on_chunk : callable, optional
        Called with (chunks done, chunks in all).

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
            f"more text "
            "or a shorter chunk length"
        )
    chunk_len = lengths.pop()
    front = torch.tensor([], dtype=torch.int64) if prefix_ids is None else prefix_ids
    front = stack.check_ids("prefix_ids", front)
    totals = torch.zeros(stack.num_layers, chunk_len, dtype=torch.float64, device=stack.device)

    def add(layer: int, scores: torch.Tensor) -> None:
        # Slots from the front to the last one are distances from chunk_len - 1 down to 0.
        totals[layer] += scores[len(front) :].flip(0)

    positions = torch.arange(len(front) + chunk_len, device=stack.device)
    for done, chunk in enumerate(chunks, start=1):
        ids = torch.cat((front, stack.check_ids("chunk", chunk)))
        node_pass = NodePass(span=len(ids), on_scores=add, keep_kv=False)
        stack.run(stack.embed(ids), positions, range(stack.num_layers), node_pass)
        if on_chunk is not None:
            on_chunk(done, len(chunks))
    return (totals / len(chunks)).float().cpu()


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
