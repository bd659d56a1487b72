"""The whole method in one process: compress a prompt, generate from it, score a continuation.

Knows nothing about machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from homer.attention import NodePass
from homer.bias import find_bias, load_bias, warn_uncalibrated
from homer.config import HomerConfig
from homer.context import CompressedContext
from homer.encode import NodeReport, TreeEncoder
from homer.errors import BiasError, ConfigError, PromptError
from homer.generation import generate_tokens
from homer.load_options import LoadOptions
from homer.loading import load_model
from homer.plan import MergePlan
from homer.sampling import SamplingParams
from homer.shape import ModelShape, defaults_for
from homer.stack import LayerStack, decoder_of


class HomerModel:
    """A causal LM with hierarchical context merging.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only causal LM.
    config : HomerConfig
    bias : torch.Tensor of shape (num_layers, max_distance + 1), optional
        Calibration bias. None means zeros, and a warning about what that costs.
    leaf_batch_size : int
        Leaves that run together, layer by layer, so that offloaded weights are brought in once for
        all of them; 0 is as many as half of the free memory has room for, and one where all weights
        stay in place. It changes no answer.

    Raises
    ------
    BiasError
        When the bias does not fit the model.
    ModelError
        When Homer cannot drive the model.

    Examples
    --------
    >>> import torch
    >>> from homer import HomerModel
    >>> hm = HomerModel.from_pretrained(model)
    >>> prefix_ids, question_ids = torch.tensor([1]), torch.tensor([5, 6, 7])
    >>> document_ids = torch.arange(10, 1000)
    >>> context = hm.compress(prefix_ids, document_ids, question_ids)
    >>> context.cache_len <= hm.config.target_len
    True
    >>> len(hm.generate(context, max_new_tokens=8, ignore_eos=True))
    8
    """

    def __init__(
        self,
        model: Any,
        config: HomerConfig,
        bias: torch.Tensor | None = None,
        leaf_batch_size: int = 0,
    ) -> None:
        if leaf_batch_size < 0:
            raise ConfigError(f"leaf_batch_size is {leaf_batch_size}; use 1 or more, or 0 for auto")
        self.model = model
        self.config = config
        self.leaf_batch_size = leaf_batch_size
        self.stack = LayerStack(model)
        if bias is not None and (bias.dim() != 2 or bias.shape[0] != self.stack.num_layers):
            raise BiasError(
                f"the bias has shape {tuple(bias.shape)}, but the model has "
                f"{self.stack.num_layers} layers and needs ({self.stack.num_layers}, distances); "
                "calibrate it for this model"
            )
        if bias is None and config.wants_bias:
            warn_uncalibrated()
        self.bias = None if bias is None else bias.to(self.stack.device)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        config: HomerConfig | None = None,
        bias: torch.Tensor | str | Path | None = None,
        load: LoadOptions | None = None,
        leaf_batch_size: int = 0,
        **kwargs: Any,
    ) -> HomerModel:
        """Load a model in Hugging Face format.

        Without `config`, the settings beside the model or derived from its window are used; without
        `bias`, the bias file beside the model if there is one. `leaf_batch_size` is that of the
        class. `kwargs` go to `homer.loading.load_model` beside `load`: fields of `LoadOptions`, and
        what transformers takes beyond.
        """
        revision = kwargs.get("revision", load.revision if load else None)
        model = load_model(path_or_id, load, **kwargs)
        if bias is None:
            bias = find_bias(path_or_id, revision)
        if isinstance(bias, (str, Path)):
            bias = load_bias(
                bias,
                num_layers=decoder_of(model).config.num_hidden_layers,
                hidden_size=decoder_of(model).config.hidden_size,
            )
        if config is None:
            # From the model as it was loaded: `kwargs` may have scaled its window.
            config = defaults_for(path_or_id, ModelShape.of(model.config), revision)
        return cls(model, config, bias, leaf_batch_size)

    def plan(self, prefix_len: int, context_len: int, suffix_len: int) -> MergePlan:
        """The merge plan for a prompt of these lengths."""
        return MergePlan.build(
            prefix_len, context_len, suffix_len, self.stack.num_layers, self.config
        )

    def compress(
        self,
        prefix_ids: torch.Tensor,
        context_ids: torch.Tensor,
        suffix_ids: torch.Tensor,
        on_node: Callable[[NodeReport], None] | None = None,
    ) -> CompressedContext:
        """Compress prefix + context + suffix into one cache of at most `target_len` tokens.

        Parameters
        ----------
        prefix_ids, context_ids, suffix_ids : torch.Tensor of shape (n,) or (1, n), integer
            The suffix is the question: its last token decides what is kept. The prefix may be
            empty.
        on_node : callable, optional
            Called after each node of the tree.

        Raises
        ------
        PromptError, PlanError, BiasError
            With what to change.
        """
        prefix_ids = self.stack.check_ids("prefix_ids", prefix_ids)
        context_ids = self.stack.check_ids("context_ids", context_ids)
        suffix_ids = self.stack.check_ids("suffix_ids", suffix_ids)
        plan = self.plan(len(prefix_ids), len(context_ids), len(suffix_ids))
        encoder = TreeEncoder(self.stack, plan, prefix_ids, suffix_ids, self.bias)
        batch = self.leaf_batch_size or encoder.choose_batch_size(
            plan.root.id, self.stack.free_bytes() // 2
        )
        root = encoder.run_subtree(plan.root.id, context_ids, on_node, leaf_batch_size=batch)
        return encoder.finish(root)

    def stream(self, context: CompressedContext, **sampling: Any) -> Iterator[int]:
        """Token ids one by one, by the fields of `SamplingParams`."""
        return generate_tokens(self.stack, context, SamplingParams(**sampling))

    def generate(
        self, context: CompressedContext, max_new_tokens: int = 256, **sampling: Any
    ) -> torch.Tensor:
        """Token ids of an answer, shape (new,); an end-of-sequence token is left out.

        `sampling` are the fields of `SamplingParams`; the default is greedy.
        """
        tokens = list(self.stream(context, max_new_tokens=max_new_tokens, **sampling))
        return torch.tensor(tokens, dtype=torch.int64, device=self.stack.device)

    @torch.inference_mode()
    def score(self, context: CompressedContext, ids: torch.Tensor) -> torch.Tensor:
        """Logits of a continuation: row i predicts `ids[i]`. Shape (len(ids), vocab), float32.

        For perplexity: the mean of `cross_entropy(score(context, ids), ids)`.
        """
        ids = self.stack.check_ids("ids", ids)
        if not len(ids):
            raise PromptError("the continuation is empty; give one token or more")
        if len(ids) == 1:
            return context.logits[None]
        rest = ids[:-1]
        start = context.next_position
        positions = torch.arange(start, start + len(rest), device=self.stack.device)
        layer_pass = NodePass(
            span=start,
            end=start + len(rest),
            past=context.layers.__getitem__,
            past_positions=context.position_ids,
            keep_kv=False,
        )
        layers = range(self.stack.num_layers)
        hidden = self.stack.run(self.stack.embed(rest), positions, layers, layer_pass)
        return torch.cat((context.logits[None], self.stack.logits(hidden)))
