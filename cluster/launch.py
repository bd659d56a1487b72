"""Starts and stops a service: joins or starts a Ray cluster, and puts a coordinator on it.

What the command line, the demo and the tests use. Knows nothing about requests.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.coordinator import NAMESPACE, Coordinator
from cluster.errors import PlacementError
from cluster.keeper import Keeper, keeper_name
from cluster.leaf_layers import with_leaf_layers
from cluster.options import ServeOptions
from cluster.placement import WorkerSpec, placement_problem, total
from cluster.slot import cause_of
from homer.errors import HomerError

_log = logging.getLogger(__name__)

STOP_TIMEOUT_SECONDS = 30.0
START_ATTEMPTS = 3
RESTART_POLL_SECONDS = 0.2
REACH_SECONDS = 10.0
LOOPBACK = "127.0.0.1"
WORKER_TOKEN_BYTES = 32


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
        When the cluster cannot be reached, or this machine is too busy to start one.
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
            _check_reachable(address)
            try:
                ray.init(address=address, **common)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise PlacementError(
                    f"cannot join the Ray cluster at {address}: {error} (where it asks for a "
                    "token, set RAY_AUTH_MODE=token, with the token in ~/.ray/auth_token)"
                ) from error
        else:
            # Short, because the paths of Ray's sockets are limited to 107 characters.
            folder = tempfile.mkdtemp(prefix="homer-")
            _start_ray(
                num_cpus=int(total(_largest(options))["CPU"]),
                include_dashboard=False,
                # Ray runs workers at the lowest priority; here somebody waits for them.
                _system_config={"worker_niceness": 0},
                _temp_dir=folder,
                **common,
            )
            _check_room(options)
            options = dataclasses.replace(options, worker_host=options.worker_host or LOOPBACK)
        if threading.current_thread() is threading.main_thread():
            # Ray takes over SIGTERM; how this process ends is for its caller to say.
            signal.signal(signal.SIGTERM, on_term or signal.SIG_DFL)
        yield options
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _start_ray(**settings: Any) -> None:
    """Start Ray on this machine, again where its processes did not come up in Ray's half minute."""
    for attempts_left in reversed(range(START_ATTEMPTS)):
        before = set(psutil.Process().children(recursive=True))
        try:
            ray.init(address="local", **settings)
        except Exception as error:
            # Ray has no type of its own for this, and leaves behind what it started.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            for process in set(psutil.Process().children(recursive=True)) - before:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if not attempts_left:
                raise PlacementError(
                    "Ray did not start on this machine in the time that it gives itself; the "
                    "machine is too busy: try again, or join a running cluster (--address)"
                ) from error
            _log.warning("Ray did not start in time on this busy machine; it is started again")
        else:
            return


def _check_reachable(address: str) -> None:
    """Ray would try for minutes, and write about it."""
    host, _, port = address.rpartition(":")
    # Names like auto, and Ray Client's ray://, are for Ray to look up.
    if not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise PlacementError(
            f"no Ray cluster answers at {address}: {error}; start one there (ray start --head), or "
            "give another address"
        ) from error


def _largest(options: ServeOptions) -> list[WorkerSpec]:
    return options.initial + [options.main_spec] * (options.most - options.workers)


def _check_room(options: ServeOptions) -> None:
    """A cluster of one machine does not grow: do not wait for what it can never have."""
    has = ray.cluster_resources()
    if any(has.get(kind, 0) < amount for kind, amount in total(options.initial).items()):
        raise placement_problem(
            options.initial, options.placement, has, ray.available_resources(), 1
        )


@contextmanager
def running_service(options: ServeOptions) -> Iterator[str]:
    """A service on the Ray cluster that this process has joined; gives its address.

    Ray restarts its parts when they die; all of them end with this process.

    Raises
    ------
    HomerError
        When it cannot start, with the reason: no room, a model that cannot be loaded, a port in
        use.
    """
    options = with_leaf_layers(options)
    # In the arguments of actors alone: no command line, environment, log line or name has it.
    token = options.worker_token or secrets.token_urlsafe(WORKER_TOKEN_BYTES)
    options = dataclasses.replace(options, worker_token=token)
    # Beside whoever starts it: that is where the address is meant.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    settings: dict[str, Any] = {
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_restarts": -1,
        "scheduling_strategy": here,
    }
    keeper_actor: Any = ray.remote(Keeper)
    try:
        keeper = keeper_actor.options(name=keeper_name(options.name), **settings).remote()
    except ValueError as error:
        raise PlacementError(
            f"a service named {options.name!r} is running on this Ray cluster; stop it or choose "
            "another --name"
        ) from error
    actor: Any = ray.remote(Coordinator)
    coordinator = actor.options(name=options.name, **settings).remote(options)
    try:
        yield _start(coordinator)
    finally:
        try:
            ray.get(coordinator.stop.remote(), timeout=STOP_TIMEOUT_SECONDS)
        except (RayError, GetTimeoutError) as error:
            _log.warning("the coordinator did not stop in peace: %s", error)
        ray.kill(coordinator)
        ray.kill(keeper)


def drain_service(options: ServeOptions) -> None:
    """Let the service finish what runs, within its time of grace; it takes nothing new any more."""
    coordinator = ray.get_actor(options.name, NAMESPACE)
    grace = options.grace_seconds
    try:
        ray.get(coordinator.drain.remote(grace), timeout=grace + STOP_TIMEOUT_SECONDS)
    except (RayError, GetTimeoutError) as error:
        _log.warning("the coordinator did not drain in peace: %s", error)


def drain_node(name: str, node_id: str | None, grace_seconds: float) -> dict[str, bool]:
    """Let what a service runs on a node of this process's cluster end; by default on its own node.

    Returns the service's workers there, each with whether it holds nothing any more. A service
    that ends meanwhile leaves none.

    Raises
    ------
    PlacementError
        When there is no such service or node.
    """
    nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    node_id = node_id or ray.get_runtime_context().get_node_id()
    if node_id not in nodes:
        raise PlacementError(
            f"the Ray cluster has no node {node_id!r}; `ray list nodes` shows its nodes"
        )
    try:
        coordinator: Any = ray.get_actor(name, NAMESPACE)
    except ValueError:
        raise PlacementError(
            f"no service named {name!r} runs on this Ray cluster; --name says which is meant"
        ) from None
    draining = coordinator.drain_node.remote(node_id, grace_seconds)
    try:
        drained: dict[str, bool] = ray.get(draining, timeout=grace_seconds + STOP_TIMEOUT_SECONDS)
    except ActorDiedError:
        return {}
    except (RayError, GetTimeoutError) as error:
        raise PlacementError(f"the service {name!r} did not drain: {error}") from error
    return drained


def watch_service(name: str, tell: Callable[[str], None]) -> None:
    """Wait for as long as the service runs; `tell` says when it is gone and when it is back.

    Raises
    ------
    HomerError
        When the coordinator is gone and cannot come back.
    """
    coordinator = ray.get_actor(name, NAMESPACE)
    while True:
        try:
            ray.get(coordinator.until_ended.remote())
            return
        except RayActorError as error:
            if isinstance(error, ActorDiedError):
                raise PlacementError(f"the coordinator is gone for good: {error}") from error
        tell("the coordinator died, and running requests with it; Ray restarts it")
        tell(f"the coordinator is back at {_start(coordinator, again=True)}")


def _start(coordinator: Any, again: bool = False) -> str:
    while True:
        try:
            return str(ray.get(coordinator.start.remote()))
        except ActorUnavailableError as error:
            if not again:
                raise PlacementError(f"the coordinator died while it started: {error}") from error
            time.sleep(RESTART_POLL_SECONDS)
        except RayActorError as error:
            raise PlacementError(f"the coordinator cannot start: {error}") from error
        except RayTaskError as error:
            cause = cause_of(error)
            if isinstance(cause, HomerError):
                raise cause from None
            if isinstance(cause, OSError):
                raise PlacementError(str(cause)) from None
            raise
