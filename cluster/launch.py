"""Starts and stops a service: joins or starts a Ray cluster, and puts a coordinator on it.

What the command line, the demo and the tests use. Knows nothing about requests.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.coordinator import NAMESPACE, Coordinator
from cluster.errors import PlacementError
from cluster.options import ServeOptions, placement_problem
from homer.errors import HomerError

_log = logging.getLogger(__name__)

STOP_TIMEOUT_SECONDS = 30.0
LOOPBACK = "127.0.0.1"


@contextmanager
def ray_cluster(
    address: str | None, options: ServeOptions, *, show_logs: bool = False
) -> Iterator[ServeOptions]:
    """Join the Ray cluster at `address`, or start one on this machine for as long as this lasts.

    A cluster started here has its own ports and folder, so that it disturbs no other Ray of the
    machine, and all of its processes end with it.

    Gives the options for a service on this cluster: on one of this machine alone, workers listen on
    the loopback address.

    Raises
    ------
    PlacementError
        When the cluster cannot be reached.
    """
    common: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": show_logs,
        "logging_level": logging.INFO if show_logs else logging.ERROR,
    }
    # Ray warns that it will stop hiding accelerators from processes that asked for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    folder: str | None = None
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None:
            try:
                ray.init(address=address, **common)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise PlacementError(
                    f"cannot join the Ray cluster at {address}: {error}"
                ) from error
        else:
            # Short, because the paths of Ray's sockets are limited to 107 characters.
            folder = tempfile.mkdtemp(prefix="homer-")
            ray.init(
                address="local",
                num_cpus=int(options.bundle["CPU"]) * options.workers,
                include_dashboard=False,
                # Ray runs workers at the lowest priority; here somebody waits for them.
                _system_config={"worker_niceness": 0},
                _temp_dir=folder,
                **common,
            )
            _check_room(options)
            options = dataclasses.replace(options, worker_host=LOOPBACK)
        if threading.current_thread() is threading.main_thread():
            # Ray takes over SIGTERM; how this process ends is for its caller to say.
            signal.signal(signal.SIGTERM, on_term or signal.SIG_DFL)
        yield options
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_room(options: ServeOptions) -> None:
    """A cluster of one machine does not grow: do not wait for what it can never have."""
    total = ray.cluster_resources()
    for kind, amount in options.bundle.items():
        if total.get(kind, 0) < amount * options.workers:
            raise placement_problem(options, total, ray.available_resources(), 1)


@contextmanager
def running_service(options: ServeOptions) -> Iterator[str]:
    """A service on the Ray cluster that this process has joined; gives its address.

    Raises
    ------
    HomerError
        When it cannot start, with the reason: no room, a model that cannot be loaded, a port in
        use.
    """
    actor: Any = ray.remote(Coordinator)
    try:
        coordinator = actor.options(
            name=options.name,
            namespace=NAMESPACE,
            num_cpus=0,
            # Beside whoever starts it: that is where the address is meant.
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=True
            ),
        ).remote(options)
    except ValueError as error:
        raise PlacementError(
            f"a service named {options.name!r} is running on this Ray cluster; stop it or choose "
            "another --name"
        ) from error
    try:
        yield _start(coordinator)
    finally:
        try:
            ray.get(coordinator.stop.remote(), timeout=STOP_TIMEOUT_SECONDS)
        except (RayError, GetTimeoutError) as error:
            _log.warning("the coordinator did not stop in peace: %s", error)
        ray.kill(coordinator)


def _start(coordinator: Any) -> str:
    try:
        address: str = ray.get(coordinator.start.remote())
    except RayTaskError as error:
        # The error inside is the one that says what to change; Ray's wrapper adds its traceback.
        cause = error.cause
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, HomerError):
            raise cause from None
        if isinstance(cause, OSError):
            raise PlacementError(str(cause)) from None
        raise
    except RayActorError as error:
        raise PlacementError(f"the coordinator died while it started: {error}") from error
    return address
