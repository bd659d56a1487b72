"""How many layers leaf workers load, where nobody says. Knows nothing about Ray."""

from __future__ import annotations

import logging
from dataclasses import replace

from cluster.options import ServeOptions
from homer.errors import ConfigError, PlanError
from homer.plan import MergePlan
from homer.shape import ModelShape, homer_defaults

_log = logging.getLogger(__name__)
_QUESTION_TOKENS = 32


def with_leaf_layers(options: ServeOptions) -> ServeOptions:
    """`options` with the number of layers that leaf workers load.

    As many as leaves run of a document that has one for every worker: shorter documents, whose
    leaves run more layers, have too few leaves to need these workers; those of longer ones run
    fewer.

    Raises
    ------
    ConfigError
        When there is no plan for such a document.
    """
    if not options.leaf_workers or options.leaf_layers:
        return options
    hub = options.load.hub
    config = homer_defaults(options.model, hub=hub, **options.compression.given())
    chunk = config.max_initial_chunk_len or config.max_chunk_len
    question = min(_QUESTION_TOKENS, max(1, chunk // 8))
    tokens = len(options.initial) * (chunk - question - 1)
    layers = ModelShape.load(options.model, **hub).num_layers
    try:
        plan = MergePlan.build(1, tokens, question, layers, config)
    except PlanError as error:
        raise ConfigError(
            f"leaf_layers is not given, and cannot be derived: there is no plan for a document of "
            f"{tokens} tokens ({error}); give leaf_layers"
        ) from error
    needed = plan.leaves[0].layer_end
    _log.info(
        "leaf workers load %d of %d layers: they take leaves of documents of about %d tokens on",
        needed, layers, tokens,
    )  # fmt: skip
    return replace(options, leaf_layers=needed)
