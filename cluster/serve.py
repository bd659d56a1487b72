"""The HTTP door as a Ray Serve application.

    serve run cluster.serve:build_app model=path/to/model workers=2 cpu=true
    serve run cluster.serve:build_app service=127.0.0.1:50051

With `model` the application starts a service of its own, which ends with it; with `service` it is
a door of one that runs. Replicas of the door hold nothing: any number of them may stand before one
service.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from contextlib import ExitStack
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.http.app import HttpDoor, build_http
from cluster.launch import running_service
from cluster.options import CompressionOverrides, ServeOptions
from cluster.service import Limits
from cluster.text import leave_out_torch
from homer.errors import ConfigError
from workers.security import Security
from workers.tls import Tls

APP_NAME = "homer"
# Requests that a replica answers at once; it only passes them on.
MAX_ONGOING_REQUESTS = 256
# Those that wait for one, at each of Serve's proxies, which has read of them whatever came: the
# next gets 503.
MAX_QUEUED_REQUESTS = 256
# Passing requests on takes little; the processors are for workers.
_NO_CPU = {"num_cpus": 0}
_NESTED = ("compression", "limits", "security", "worker_tls", "worker_token")


class DoorArgs(BaseModel):
    """Arguments of `build_app`: these, and all settings of `cluster.options.ServeOptions`."""

    model_config = ConfigDict(extra="forbid")

    service: str | None = None
    model: str | None = None
    served_model_name: str = ""
    replicas: int = Field(default=1, ge=1)
    max_context_tokens: int = Field(default=Limits().context_tokens, ge=1)
    compression: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    tokens_file: str | None = None
    insecure_no_token: bool = False
    tls: Tls | None = None
    worker_tls: Tls | None = None

    @model_validator(mode="before")
    @classmethod
    def _gather_settings(cls, values: dict[str, Any]) -> dict[str, Any]:
        names = {one.name for one in dataclasses.fields(ServeOptions)} - {"model", *_NESTED}
        given = {name: value for name, value in values.items() if name in names}
        rest = {name: value for name, value in values.items() if name not in names}
        return {"settings": given, **rest}

    @model_validator(mode="after")
    def _one_of_two(self) -> DoorArgs:
        if (self.service is None) == (self.model is None):
            raise ValueError("give model, or the service (host:port) of one that runs")
        if self.service is not None and (self.settings or self.compression):
            raise ValueError("settings of workers are for model; the service has its own already")
        if self.model is not None and self.tls is not None and self.tls.ca is None:
            raise ValueError("tls needs the ca by which the door knows its own service")
        return self

    def security(self) -> Security:
        """Who may call: the door and the service behind it ask for the same tokens.

        Raises
        ------
        ConfigError
            When the tokens cannot be read.
        """
        return Security.given(self.tokens_file, self.tls, self.insecure_no_token)

    def options(self) -> ServeOptions:
        """The settings of the service.

        Raises
        ------
        ConfigError
            When one of them is wrong.
        """
        settings = {"port": 0, **self.settings}
        types = {one.name: one.type for one in dataclasses.fields(ServeOptions)}
        for name, value in settings.items():
            # `serve run` hands over what it reads on its command line as text.
            if isinstance(value, str) and types[name] != "str":
                settings[name] = _read(name, value, str(types[name]))
        return ServeOptions(
            model=self.model or "",
            limits=Limits(context_tokens=self.max_context_tokens),
            compression=CompressionOverrides(**self.compression),
            security=self.security(),
            worker_tls=self.worker_tls,
            **settings,
        )


def _read(name: str, value: str, kind: str) -> object:
    if kind.startswith("str") or kind == "Placement":
        return value
    if kind == "bool":
        if value.lower() in ("true", "1", "yes"):
            return True
        if value.lower() in ("false", "0", "no"):
            return False
        raise ConfigError(f"{name} is {value!r}; use true or false")
    try:
        return int(value) if "int" in kind else float(value)
    except ValueError as error:
        raise ConfigError(f"{name} is {value!r}; use a number") from error


class Service:
    """A Homer service for as long as this replica lives."""

    def __init__(self, options: ServeOptions) -> None:
        self._address = ""
        self._failed: BaseException | None = None
        self._end = threading.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(options,), daemon=True)
        self._thread.start()

    async def address(self) -> str:
        """Where its gRPC door is, when it serves."""
        await asyncio.to_thread(self._up.wait)
        if self._failed is not None:
            raise self._failed
        return self._address

    def check_health(self) -> None:
        """Serve replaces this replica where it has failed."""
        if self._failed is not None:
            raise self._failed

    def __del__(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self, options: ServeOptions) -> None:
        try:
            with ExitStack() as stack:
                self._address = stack.enter_context(running_service(options))
                self._up.set()
                self._end.wait()
        except BaseException as error:
            self._failed = error
        finally:
            self._up.set()


class Door:
    """One replica of the HTTP door, before the service at an address."""

    # Serve awaits it: the replica is there when it can answer.
    async def __init__(  # type: ignore[misc]
        self, service: DeploymentHandle | str, model_name: str, security: Security
    ) -> None:
        security.check_host(_serve_host())
        leave_out_torch()
        address = service if isinstance(service, str) else await service.address.remote()
        self._door = HttpDoor(address, model_name, security.open_tokens(), security.tls)
        await self._door.served()

    def __serve_build_asgi_app__(self) -> Any:
        return build_http(self._door)


def build_app(args: dict[str, Any]) -> Application:
    """The application; `serve run cluster.serve:build_app …` and Serve's config files call this.

    Parameters
    ----------
    args : dict
        As `DoorArgs` describes them.

    Raises
    ------
    ConfigError
        When one of them is wrong.
    """
    try:
        door = DoorArgs(**args)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc'])) or 'args'}: {first['msg']}") from None
    service: Any = door.service
    if door.service is None:
        own = serve.deployment(name="Service", num_replicas=1, ray_actor_options=_NO_CPU)(Service)
        service = own.bind(door.options())
    replicas = serve.deployment(
        name="Door",
        num_replicas=door.replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        ray_actor_options=_NO_CPU,
    )(serve.ingress()(Door))
    return replicas.bind(service, door.served_model_name, door.security())


def _serve_host() -> str:
    """Where Serve listens: it has no public way to ask."""
    client: Any = serve.context._get_global_client()
    return str(client.http_config.host)
