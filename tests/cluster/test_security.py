"""One service with tokens and mutual TLS on every port: who gets in, and what never gets out."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from fastapi import FastAPI
from fastapi.routing import APIRoute
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from cluster.client import HomerClient
from cluster.errors import ServiceError
from cluster.http.app import HttpDoor, build_http
from cluster.http.middleware import is_open
from cluster.launch import LOOPBACK, running_service
from cluster.options import ServeOptions
from homer.errors import ConfigError, PromptError
from homer.v1 import long_context_pb2, worker_pb2
from tests.certificates import Authority
from tests.cluster.http.test_http import serving
from tests.cluster.processes import BIN
from tests.cluster.test_service import CONTEXT, QUESTION
from workers.addresses import check_address
from workers.channels import Credentials
from workers.security import Security
from workers.tls import Tls
from workers.tokens import Tokens

ANNA, BERT, CARA = "anna-has-this-token", "bert-has-another-one", "cara-has-one-later-on"
WRONG = "nobody-has-this-token"
WORKERS = "what-workers-ask-of-each-other"
SECRETS = (ANNA, BERT, CARA, WORKERS)
ASK: Any = {"context": CONTEXT, "question": QUESTION, "sampling": {"max_tokens": 4}}
SECONDS = 30.0


@dataclass
class Secured:
    """A service, and what it takes to be let in."""

    address: str
    workers: list[str]
    authority: Authority
    tokens_file: Path
    door: Tls
    client: Tls
    worker: Tls

    def connect(self, token: str | None = ANNA, tls: Tls | None = None) -> HomerClient:
        return HomerClient(self.address, token=token, tls=tls or self.client)


@pytest.fixture(scope="module")
def secured(
    ray_session: None, text_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("security")
    authority = Authority(folder, "authority")
    door, client = authority.issue("door", LOOPBACK), authority.issue("client")
    # One certificate for all workers, whatever their addresses.
    worker = replace(authority.issue("homer-worker"), server_name="homer-worker")
    tokens_file = folder / "tokens"
    tokens_file.write_text(f"anna={ANNA}\nbert={BERT}\n")
    options = ServeOptions(
        model=str(text_model),
        cpu=True,
        workers=2,
        port=0,
        name="secured",
        worker_host=LOOPBACK,
        metrics_port=0,
        security=Security(tokens_file=str(tokens_file), tls=door),
        worker_tls=worker,
        worker_token=WORKERS,
    )
    with running_service(options) as address:
        with HomerClient(address, token=ANNA, tls=client) as asking:
            workers = [one.address for one in asking.server_info().workers]
        yield Secured(address, workers, authority, tokens_file, door, client, worker)


@contextmanager
def channel(address: str, tls: Tls, token: str | None) -> Iterator[grpc.Channel]:
    made = Credentials(token, tls).channel(address, ())
    try:
        yield made
    finally:
        made.close()


def code_of(channel: grpc.Channel, method: str) -> grpc.StatusCode:
    """How a call of any kind with an empty message ends."""
    multi: Any = channel.stream_stream(method, None, None)
    call = multi(iter([b""]), timeout=SECONDS)
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        pass
    code: grpc.StatusCode = call.code()
    return code


def methods(*services: Any) -> list[str]:
    return [f"/{one.full_name}/{method.name}" for one in services for method in one.methods]


DOOR_METHODS = methods(
    long_context_pb2.DESCRIPTOR.services_by_name["LongContext"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
)
WORKER_METHODS = methods(worker_pb2.DESCRIPTOR.services_by_name["Worker"])


def test_every_call_of_the_door_needs_a_right_token(secured: Secured) -> None:
    for token in (None, WRONG, WORKERS):
        with channel(secured.address, secured.client, token) as one:
            for method in [*DOOR_METHODS, "/homer.v1.LongContext/NoSuchCall"]:
                assert code_of(one, method) is grpc.StatusCode.UNAUTHENTICATED, method
    with channel(secured.address, secured.client, ANNA) as one:
        for method in DOOR_METHODS:
            code = code_of(one, method)
            assert code not in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNKNOWN}, method


def test_every_call_of_a_worker_needs_the_token_of_the_service(secured: Secured) -> None:
    for address in secured.workers:
        # A user's token is none for workers.
        for token in (None, WRONG, ANNA):
            with channel(address, secured.worker, token) as one:
                for method in WORKER_METHODS:
                    assert code_of(one, method) is grpc.StatusCode.UNAUTHENTICATED, method
        with channel(address, secured.worker, WORKERS) as one:
            for method in WORKER_METHODS:
                code = code_of(one, method)
                assert code not in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNKNOWN}


def test_health_is_open(secured: Secured) -> None:
    for address, tls in ((secured.address, secured.client), (secured.workers[0], secured.worker)):
        with channel(address, tls, None) as one:
            stub: Any = health_pb2_grpc.HealthStub(one)
            answer = stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_answer_is_that_of_a_service_without_tokens_and_tls(
    secured: Secured, service: HomerClient
) -> None:
    *_, expected = service.generate(**ASK)
    with secured.connect() as client:
        *_, summary = client.generate(**ASK)
    assert isinstance(summary, long_context_pb2.Summary)
    assert isinstance(expected, long_context_pb2.Summary)
    assert list(summary.token_ids) == list(expected.token_ids)
    # So the two workers have called each other.
    assert len(summary.nodes_by_worker) == 2


def test_who_is_refused_is_told_what_to_send(secured: Secured) -> None:
    for token, told in (
        (None, "no token came with the call; send"),
        (WRONG, "is not one of those"),
    ):
        with secured.connect(token) as client, pytest.raises(ServiceError, match=told) as caught:
            client.server_info()
        assert caught.value.code == "UNAUTHENTICATED"
        assert WRONG not in str(caught.value)


def test_tokens_change_with_their_file(secured: Secured) -> None:
    before = secured.tokens_file.read_text()
    try:
        with secured.connect(CARA) as client:
            with pytest.raises(ServiceError):
                client.server_info()
            secured.tokens_file.write_text(f"{before}cara={CARA}\n")
            assert client.server_info().workers
            secured.tokens_file.write_text(before)
            with pytest.raises(ServiceError):
                client.server_info()
    finally:
        secured.tokens_file.write_text(before)


def test_only_the_token_that_began_a_request_may_abort_it(secured: Secured) -> None:
    endless: Any = {**ASK, "sampling": {"max_tokens": 60_000, "ignore_eos": True}}

    def begun(client: HomerClient) -> Any:
        events = client.generate(**endless, request_id="annas")
        assert [type(next(events)).__name__ for _ in range(2)] == ["Accepted", "Progress"]
        return events

    def refusal(client: HomerClient, name: str) -> tuple[str, str]:
        with pytest.raises(ServiceError) as caught:
            client.abort(name)
        return caught.value.code, str(caught.value).replace(repr(name), "it")

    def is_aborted(events: Any) -> bool:
        with pytest.raises(ServiceError) as caught:
            list(events)
        return caught.value.code == "CANCELLED"

    with secured.connect(ANNA) as anna, secured.connect(BERT) as bert:
        annas = begun(anna)
        # The service's own name of it, which its status shows to everybody.
        (shown,) = [one.request_id for one in bert.server_info().requests]
        assert shown.startswith("annas-")
        nothing = refusal(bert, "nobodys")
        assert nothing[0] == "NOT_FOUND"
        assert refusal(bert, "annas") == refusal(bert, shown) == nothing
        # Of those that are called the same, each ends their own.
        berts = begun(bert)
        assert bert.abort("annas") == 1
        assert is_aborted(berts)
        assert anna.abort(shown) == 1
        assert is_aborted(annas)


def is_refused(secured: Secured, tls: Tls) -> bool:
    """Whether a connection does not come about."""
    with channel(secured.address, tls, ANNA) as one:
        return code_of(one, "/homer.v1.LongContext/GetServerInfo") is grpc.StatusCode.UNAVAILABLE


def test_certificates_of_others_that_have_expired_or_are_missing_are_refused(
    secured: Secured, tmp_path: Path
) -> None:
    foreign = Authority(tmp_path, "foreign")
    stranger = foreign.issue("stranger")
    ours = secured.authority.file
    assert is_refused(secured, Tls(ca=ours))
    assert is_refused(secured, replace(stranger, ca=ours))
    assert is_refused(secured, secured.authority.issue("late", days=-1))
    # The other way round: a server that is not who the client wants.
    assert is_refused(secured, replace(secured.client, ca=foreign.file))
    assert is_refused(secured, replace(secured.client, server_name="another.example"))
    with HomerClient(secured.address, token=ANNA) as plain, pytest.raises(ServiceError):
        plain.server_info()
    assert not is_refused(secured, secured.client)


def test_a_new_certificate_counts_for_the_next_connection(secured: Secured, tmp_path: Path) -> None:
    files = [Path(secured.door.cert or ""), Path(secured.door.key or "")]
    before = [file.read_bytes() for file in files]
    late = Authority(tmp_path, "late").issue("door", LOOPBACK, days=-1)
    try:
        shutil.copy(late.cert or "", files[0])
        # Half of it is there: the old pair goes on.
        assert not is_refused(secured, secured.client)
        shutil.copy(late.key or "", files[1])
        assert is_refused(secured, secured.client)
    finally:
        for file, content in zip(files, before, strict=True):
            file.write_bytes(content)
    assert not is_refused(secured, secured.client)


def test_workers_take_neither_users_certificates_without_token_nor_plain_calls(
    secured: Secured,
) -> None:
    (first, _) = secured.workers
    with channel(first, Tls(ca=secured.authority.file, server_name="homer-worker"), WORKERS) as one:
        assert code_of(one, WORKER_METHODS[0]) is grpc.StatusCode.UNAVAILABLE
    plain = Credentials(WORKERS).channel(first, ())
    assert code_of(plain, WORKER_METHODS[0]) is grpc.StatusCode.UNAVAILABLE
    plain.close()


def test_every_route_of_the_http_door_needs_a_right_token(secured: Secured) -> None:
    tokens = Tokens(path=str(secured.tokens_file))
    door: Any = {"tokens": tokens, "tls": secured.client}

    async def build() -> FastAPI:
        # A client of gRPC is made in an event loop.
        return build_http(HttpDoor("127.0.0.1:1"))

    routes = [
        (method, route.path.replace("{name:path}", "B"))
        for route in asyncio.run(build()).routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    ]
    # Whatever FastAPI adds by itself.
    routes += [("GET", path) for path in ("/docs", "/redoc", "/openapi.json", "/nowhere")]
    assert ("POST", "/v1/completions") in routes
    with serving(secured.address, door=door) as url:
        for method, path in routes:
            for token in (None, WRONG):
                code, told = fetch(method, url + path, token)
                assert (code == 401) == (not is_open(path)), path
                if code == 401:
                    assert "Bearer TOKEN" in told
            code, _ = fetch(method, url + path, ANNA)
            assert code not in (401, 403, 500), path
        assert fetch("GET", f"{url}/v1/models", ANNA)[0] == 200
        assert fetch("GET", f"{url}/metrics", ANNA)[0] == 200
        body = b'{"model": "B", "prompt": "A b c.\\n\\nWho?", "max_tokens": 2}'
        assert fetch("POST", f"{url}/v1/completions", ANNA, body)[0] == 200
        before = secured.tokens_file.read_text()
        try:
            # What the door asks by itself, it asks with a token that counts now.
            secured.tokens_file.write_text(f"cara={CARA}\n")
            assert fetch("GET", f"{url}/health", None)[0] == 200
            assert fetch("GET", f"{url}/v1/models", ANNA)[0] == 401
        finally:
            secured.tokens_file.write_text(before)


def fetch(
    method: str,
    url: str,
    token: str | None,
    body: bytes | None = None,
    context: ssl.SSLContext | None = None,
) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    data = body or (b"{}" if method == "POST" else None)
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_commands_take_the_token_from_a_file_or_the_environment(
    secured: Secured, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(ANNA)
    tls = secured.client
    files = ["--tls-ca", str(tls.ca), "--tls-cert", str(tls.cert), "--tls-key", str(tls.key)]
    command = [str(BIN / "homer"), "status", "--server", secured.address, "--json", *files]
    done = subprocess.run(
        [*command, "--token-file", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"workers"' in done.stdout
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "no token came with the call; send" in refused.stderr


def test_no_secret_is_in_a_log_a_command_line_a_metric_or_an_error(secured: Secured) -> None:
    with secured.connect() as client:
        list(client.generate(**ASK))
        info = client.server_info()
    for token in (None, WRONG):
        with secured.connect(token) as client, pytest.raises(ServiceError):
            client.server_info()
    node: Any = ray._private.worker.global_worker.node
    logs = [file for file in Path(node.get_session_dir_path()).rglob("*") if file.is_file()]
    assert any("secured" in file.read_text(errors="replace") for file in logs), "no log was read"
    told: dict[Any, bytes] = {str(file): file.read_bytes() for file in logs}
    # Processes have their title in their command line and in comm.
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told[str(process)] = b"".join(
                (process / name).read_bytes() for name in ("cmdline", "comm", "environ")
            )
        except OSError:
            continue
    told["server info"] = str(info).encode()
    context = ssl.create_default_context(cafile=secured.authority.file)
    context.load_cert_chain(secured.client.cert or "", secured.client.key)
    # Workers are reached by address, and have one name.
    context.check_hostname = False
    for address in (info.metrics_address, *(one.metrics_address for one in info.workers)):
        for path in ("metrics", "targets"):
            for token in (ANNA, WRONG):
                told[f"{address}/{path}", token] = fetch(
                    "GET", f"https://{address}/{path}", token, context=context
                )[1].encode()
    assert b"homer_e2e_request_latency" in told[f"{info.metrics_address}/metrics", ANNA]
    for secret in SECRETS:
        assert [place for place, text in told.items() if secret.encode() in text] == []


@pytest.mark.parametrize(
    "address",
    ["unix:/run/secret", "unix-abstract:x", "/etc/passwd", "dns:///a:1", "a", "a:b", "a:1/x", ""],
)
def test_an_address_that_a_call_names_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(PromptError, match="is no address of a worker; write host:port"):
        check_address(address)


@pytest.mark.parametrize(
    ("tls", "problem"),
    [
        ({"cert": "/nowhere"}, "give tls-cert and tls-key"),
        ({"cert": __file__, "key": __file__}, "no certificate and its key"),
        ({"ca": __file__}, "no certificate of an authority"),
        ({"ca": "/nowhere"}, "no certificate of an authority"),
    ],
)
def test_files_that_are_no_certificates_are_named(tls: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        HomerClient("127.0.0.1:1", tls=Tls(**tls))
