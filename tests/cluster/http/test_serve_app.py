"""The HTTP door as a Ray Serve application, started as a user would."""

from __future__ import annotations

import signal
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from cluster.serve import DoorArgs, build_app
from homer.errors import ConfigError
from tests.cluster.conftest import poll
from tests.cluster.processes import BIN, REPOSITORY, Lines, free_ports, sandbox

CONFIG = REPOSITORY / "deploy" / "serve.yaml"
START_SECONDS = 120.0


def is_healthy(port: int) -> bool:
    """Whether the door says that the service can answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_the_shipped_configuration_answers_chats_until_it_is_told_to_end(tmp_path: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text())
    (port,) = free_ports(1)
    config["http_options"]["port"] = port
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
        poll(lambda: is_healthy(port), "the door does not come up", START_SECONDS)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
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
