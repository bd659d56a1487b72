"""The HTTP door as a Ray Serve application, started as a user would."""

from __future__ import annotations

import asyncio
import signal
import ssl
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from cluster.errors import ServiceError
from cluster.serve import Door, DoorArgs, build_app
from homer.errors import ConfigError
from tests.certificates import Authority
from tests.cluster.conftest import poll
from tests.cluster.processes import BIN, REPOSITORY, Lines, free_ports, sandbox

CONFIG = REPOSITORY / "deploy" / "serve.yaml"
START_SECONDS = 120.0


def is_healthy(url: str, context: ssl.SSLContext | None = None) -> bool:
    """Whether the door says that the service can answer."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5, context=context) as answer:
            return bool(answer.status == 200)
    except (OSError, HTTPException):
        return False


def test_the_shipped_configuration_answers_chats_until_it_is_told_to_end(tmp_path: Path) -> None:
    """Over TLS, which the file leaves to who has certificates."""
    config = yaml.safe_load(CONFIG.read_text())
    authority = Authority(tmp_path, "authority")
    tls = authority.issue("door", "127.0.0.1")
    (port,) = free_ports(1)
    config["http_options"] |= {"port": port, "ssl_certfile": tls.cert, "ssl_keyfile": tls.key}
    url, trusting = f"https://127.0.0.1:{port}", ssl.create_default_context(cafile=authority.file)
    config["applications"][0]["args"]["workers"] = 1
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    with sandbox() as box:
        box.env |= {
            "RAY_AUTH_MODE": "disabled",
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": str(box.folder),
        }
        run = box.start(str(BIN / "serve"), "run", str(file))
        said = Lines(run.stdout), Lines(run.stderr)
        poll(lambda: is_healthy(url, trusting), "the door does not come up", START_SECONDS)
        # Neither plain, nor to who trusts others.
        assert not is_healthy(f"http://127.0.0.1:{port}")
        assert not is_healthy(url, ssl.create_default_context())
        http = openai.DefaultHttpxClient(verify=trusting)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as client:
            (model,) = client.models.list()
            document = "The sky is blue. " * 200 + "The pass key is 51234. " + "It rains. " * 200
            question = "What is the pass key? The pass key is"
            messages: Any = [
                {"role": "system", "content": "Here is a text."},
                {"role": "user", "content": f"{document}\n{question}"},
            ]
            ask: Any = {"model": model.id, "messages": messages, "temperature": 0, "max_tokens": 8}
            whole = client.chat.completions.create(**ask)
            assert whole.usage is not None
            assert whole.usage.prompt_tokens > 1000
            streamed = client.chat.completions.create(**ask, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
            assert text == whole.choices[0].message.content != ""
        run.send_signal(signal.SIGINT)
        run.wait(60)
        assert not any(lines.find("Traceback") for lines in said)
        box.assert_empty()


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({}, "give model, or the service"),
        ({"model": "m", "service": "127.0.0.1:1"}, "give model, or the service"),
        ({"service": "127.0.0.1:1", "workers": 2}, "settings of workers are for model"),
        ({"model": "m", "wrokers": 2}, "wrokers: Extra inputs"),
        ({"model": "m", "workers": "two"}, "workers is 'two'; use a number"),
        ({"model": "m", "cpu": "perhaps"}, "cpu is 'perhaps'; use true or false"),
        ({"model": "m", "workers": 0}, "workers"),
        ({"model": "m", "host": "0.0.0.0"}, "everybody who reaches 0.0.0.0"),
        ({"model": "m", "tokens_file": "/nowhere"}, "cannot read the tokens file /nowhere"),
        ({"model": "m", "tls": {"cert": "c", "key": "k"}}, "tls needs the ca"),
        ({"model": "m", "tls": {"cert": "c"}}, "tls"),
    ],
)
def test_arguments_that_are_wrong_are_refused(args: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build_app(args)


def test_arguments_of_a_command_line_are_read_as_what_they_are() -> None:
    args: dict[str, Any] = {"workers": "2", "cpu": "true", "gpus_per_worker": "0.5"}
    options = DoorArgs(model="m", max_context_tokens=1000, **args).options()
    assert (options.workers, options.cpu, options.gpus_per_worker) == (2, True, 0.5)
    assert (options.model, options.limits.context_tokens, options.port) == ("m", 1000, 0)


def test_without_a_token_the_door_is_only_where_this_machine_reaches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Serve listens before it asks for an application, and says where.
    monkeypatch.setattr("cluster.serve._serve_host", lambda: "0.0.0.0")

    def start(**args: Any) -> None:
        door = DoorArgs(service="127.0.0.1:1", **args)
        asyncio.run(Door.__init__(object.__new__(Door), "127.0.0.1:1", "", door.security()))

    with pytest.raises(ConfigError, match=r"everybody who reaches 0.0.0.0 could call this port"):
        start()
    # Told so, it goes on to ask the service, which is not there.
    with pytest.raises(ServiceError, match="no Homer service answers"):
        start(insecure_no_token=True)
