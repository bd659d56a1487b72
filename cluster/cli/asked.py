"""Whom a command asks: a service that runs, or one that is started for the command alone.

The one home of these options and of what they mean.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from cluster.cli import settings
from cluster.cli.connection import Connection, asks_a_service
from cluster.cli.load_settings import loads_a_model
from cluster.cli.option_group import option_group, options_of
from cluster.cli.settings import DEFAULTS
from homer.load_options import LoadOptions

# A coordinator that dies is back in about five seconds.
OWN_RETRIES = 5


@dataclass(frozen=True, kw_only=True)
class OwnPool:
    """The service that a command starts for itself; the fields are options of `homer serve`."""

    workers: settings.Workers = DEFAULTS.workers
    cpu: settings.Cpu = DEFAULTS.cpu
    threads: settings.Threads = DEFAULTS.threads
    address: settings.Address = None
    bias: settings.Bias = DEFAULTS.bias
    memory_budget: settings.MemoryBudget = DEFAULTS.memory_budget
    placement_timeout: settings.PlacementTimeout = DEFAULTS.placement_timeout_seconds

    @contextmanager
    def serving(self, model: str, load: LoadOptions) -> Iterator[str]:
        """The service, for as long as this lasts; gives where it is reached."""
        from cluster.launch import ray_cluster, running_service
        from cluster.options import ServeOptions

        options = ServeOptions(
            model=model,
            load=load,
            workers=self.workers,
            cpu=self.cpu,
            threads=self.threads,
            bias=self.bias,
            memory_budget=self.memory_budget,
            placement_timeout_seconds=self.placement_timeout,
            port=0,
            # Several may run on one cluster at once.
            name=f"homer-alone-{uuid.uuid4().hex}",
        )
        with (
            ray_cluster(self.address, options) as placed,
            running_service(placed) as server,
        ):
            yield server


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Either `server`, reached by `connection`; or a service of `model` on a pool of its own."""

    model: str | None
    server: str | None
    connection: Connection
    load: LoadOptions
    pool: OwnPool

    @contextmanager
    def reached(self, tell: Callable[[str], None]) -> Iterator[tuple[str, Connection]]:
        """Where the service is, and how to call it; one that was started ends with this.

        `tell` hears of what takes time.
        """
        if self.model is None:
            yield self.server or "", self.connection
            return
        tell(f"starting {self.pool.workers} worker(s) …")
        with self.pool.serving(self.model, self.load) as server:
            yield server, Connection()


@loads_a_model(device=False)
@asks_a_service
@option_group("pool", options_of(OwnPool), OwnPool)
def _asked(
    *,
    command: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="Model folder in Hugging Face format, or a model id; not with --server."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="A running service (host:port) instead of a cluster here.",
            autocompletion=lambda: [settings.DEFAULT_SERVER],
        ),
    ] = None,
    pool: OwnPool,
    load: LoadOptions,
    connection: Connection,
) -> Asked:
    if model is not None and server is not None:
        # The command line goes before variables, and these before the configuration file.
        of_model, of_server = map(command.get_parameter_source, ("model", "server"))
        if of_model is not None and of_server is not None and of_model != of_server:
            if of_model.value < of_server.value:
                server = None
            else:
                model = None
    if (model is None) == (server is None):
        raise typer.BadParameter("give either --model or --server")
    return Asked(model=model, server=server, connection=connection, load=load, pool=pool)


asks = option_group("asked", options_of(_asked), _asked)
"""Give a command the choice between both, as its parameter `asked`."""
