"""A client made by another language's tools, from the .proto files alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import grpc

from cluster.client import HomerClient
from homer.v1 import long_context_pb2 as pb
from tests.node_tools import node_folder

PROTO = Path(__file__).parents[2] / "proto"
DOCUMENT = "Ærøskøbing 🦊 jumps over the lazy dog. " * 12


def test_node_asks_uploads_aborts_and_reads_errors(service: HomerClient) -> None:
    folder = node_folder()
    shutil.copy(Path(__file__).parent / "node" / "client.js", folder)
    config = PROTO / "homer" / "v1" / "service_config.json"
    done = subprocess.run(
        ["node", "client.js", service.address, str(PROTO), str(config)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        # The service is on this machine, whatever proxy the web needs.
        env={**os.environ, "no_proxy": "*", "no_grpc_proxy": "*"},
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)

    *_, expected = service.generate(
        context=DOCUMENT, question=" What jumps?", sampling={"max_tokens": 8}
    )
    assert isinstance(expected, pb.Summary)
    kinds = got["kinds"]
    assert kinds[0] == "accepted"
    assert kinds[-1] == "summary"
    assert {"progress", "token"} <= set(kinds)
    assert got["tokens"] == list(expected.token_ids)
    assert got["summary"]["text"] == expected.text
    assert got["uploaded"]["token_ids"] == got["tokens"]
    assert got["uploaded"]["prompt_tokens"] == expected.prompt_tokens

    assert got["aborted"] == {"aborted_requests": 1}
    assert got["abort_code"] == grpc.StatusCode.CANCELLED.value[0]
    assert got["unknown"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert got["refused"]["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "the context is empty" in got["refused"]["details"]
    assert got["rich"] == 1
    assert got["counts"]["context_tokens"] == len(DOCUMENT.encode())
    assert got["info"]["model"] == service.model_info().model
