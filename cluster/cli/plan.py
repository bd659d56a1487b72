"""`homer plan`: what a prompt of some length would cost, before anything is loaded.

Needs neither Ray nor weights, and torch only for a model whose config leaves things out.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from cluster.cli.compression import compresses
from cluster.cli.load_settings import reads_a_config
from cluster.cli.settings import AsJson
from cluster.options import CompressionOverrides
from homer.config import HomerConfig
from homer.errors import ConfigError
from homer.load_options import LoadOptions
from homer.plan import MergePlan
from homer.shape import ModelShape, defaults_for, find_bias, settings_sources

_MODEL = "Model"
_DIMENSIONS = "Model dimensions, where no --model is given (defaults: Llama-2-7B)"


@reads_a_config
@compresses
def plan(
    *,
    context_tokens: Annotated[int, typer.Option(help="Tokens of the document.")],
    prefix_tokens: Annotated[int, typer.Option(help="Tokens before the document.")] = 1,
    suffix_tokens: Annotated[int, typer.Option(help="Tokens of the question.")] = 32,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or id of a model; only its config is read.", rich_help_panel=_MODEL
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(rich_help_panel=_DIMENSIONS)] = None,
    hidden: Annotated[int | None, typer.Option(rich_help_panel=_DIMENSIONS)] = None,
    intermediate: Annotated[int | None, typer.Option(rich_help_panel=_DIMENSIONS)] = None,
    heads: Annotated[int | None, typer.Option(rich_help_panel=_DIMENSIONS)] = None,
    kv_heads: Annotated[int | None, typer.Option(rich_help_panel=_DIMENSIONS)] = None,
    vocab: Annotated[int | None, typer.Option(rich_help_panel=_DIMENSIONS)] = None,
    window: Annotated[int | None, typer.Option(rich_help_panel=_DIMENSIONS)] = None,
    compression: CompressionOverrides,
    load: LoadOptions,
    tree: Annotated[bool, typer.Option(help="Print every node.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how a prompt would be cut, merged and pruned, and what that costs."""
    dimensions = {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "vocab_size": vocab,
        "window": window,
    }
    settings = compression.given()
    given = {name: value for name, value in dimensions.items() if value is not None}
    shape, config = _resolve(model, load, given, settings)
    merge_plan = MergePlan.build(
        prefix_tokens, context_tokens, suffix_tokens, shape.num_layers, config
    )
    sources = settings_sources(model, load.revision, **settings)
    calibrated = None if model is None else find_bias(model, load.revision) is not None
    _show(merge_plan, shape, sources, calibrated, tree=tree, as_json=as_json)


def _resolve(
    model: str | None,
    load: LoadOptions,
    dimensions: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[ModelShape, HomerConfig]:
    if model is not None:
        if dimensions:
            raise ConfigError("--model gives the dimensions; leave out " + ", ".join(dimensions))
        shape = ModelShape.load(model, **load.hub)
        return shape, defaults_for(model, shape, load.revision, **settings)
    shape = ModelShape(**dimensions)
    if "num_heads" in dimensions and "num_kv_heads" not in dimensions:
        shape = dataclasses.replace(shape, num_kv_heads=shape.num_heads)
    shape = dataclasses.replace(shape, head_dim=max(1, shape.hidden_size // shape.num_heads))
    return shape, shape.recommended_config(**settings)


def _show(
    plan: MergePlan,
    shape: ModelShape,
    sources: dict[str, str],
    calibrated: bool | None,
    *,
    tree: bool,
    as_json: bool,
) -> None:
    from rich.console import Console

    from homer.cost import PlanCost
    from homer.report import plan_facts, plan_summary, plan_table, plan_tree

    cost = PlanCost.of(plan, shape)
    if as_json:
        typer.echo(json.dumps(plan_summary(plan, cost, shape, sources, calibrated)))
        return
    console = Console()
    console.print(plan_facts(plan, cost, shape, sources, calibrated))
    console.print(plan_table(plan, cost))
    if tree:
        console.print(plan_tree(plan, shape), crop=False)
