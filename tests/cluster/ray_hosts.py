"""`python -m tests.cluster.ray_hosts`: `homer serve` on Ray over hosts with addresses of their own.

For the test that it works; in namespaces of its own. Each host has two interfaces, of which the
others can reach the second. Prints JSON: the exit code of `homer serve`, where its workers are, how
many nodes each ran, and the tokens of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from cluster.client import HomerClient
from homer.demo import MODEL_DIR
from homer.v1 import long_context_pb2 as pb
from tests.chaos.namespaces import SUBNET, Network

BIN = Path(sys.executable).parent
GCS_PORT = 6379
START_SECONDS = 120.0
CONTEXT = "The sky is blue. " * 400 + "The pass key is 71932. " + "The grass is green. " * 400
QUESTION = "What is the pass key? The pass key is"
NEW_TOKENS = 8
# Beyond the loopback the door wants one.
TOKEN = "the-token-of-this-test"
PROCESSES = "--num-cpus=1", "--object-store-memory=80000000", "--block"


def ask(address: str) -> dict[str, object]:
    with HomerClient(address, token=TOKEN) as client:
        workers = {worker.name: worker.address for worker in client.server_info().workers}
        *_, summary = client.generate(
            context=CONTEXT, question=QUESTION, sampling={"max_tokens": NEW_TOKENS}
        )
    assert isinstance(summary, pb.Summary)
    return {
        "workers": workers,
        "nodes": dict(summary.nodes_by_worker),
        "tokens": list(summary.token_ids),
    }


async def listening(host: str, port: int) -> None:
    """Wait until somebody listens there."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(host, port)
                writer.close()
                return
            await asyncio.sleep(0.1)


async def main(folder: str) -> dict[str, object]:
    network = Network()
    await network.open()
    # Whatever is started here ends with this process, the first of its namespace.
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HOMER_TOKENS": f"test={TOKEN}",
    }
    gcs = f"{network.address}:{GCS_PORT}"
    async with AsyncExitStack() as stack:
        log = stack.enter_context((Path(folder) / "log").open("wb"))

        async def start(*command: str, out: int | None = None) -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec(
                *command, env=environment, stdout=out or log, stderr=log
            )

        ray = f"{BIN}/ray"
        await start(
            *(ray, "start", "--head", "--node-ip-address", network.address, "--block"),
            *("--port", str(GCS_PORT), "--num-cpus=0", "--include-dashboard=false"),
            *("--object-store-memory=80000000", "--temp-dir", f"{folder}/ray"),
        )
        await listening(network.address, GCS_PORT)
        for name in ("first", "second"):
            host = await network.add_host(name, interfaces=2)
            # On a busy machine Ray's own deadline for a node to come up is now and then too short.
            await start(
                *(*host.prefix, "sh", "-c", 'until "$@"; do sleep 1; done', "-"),
                *(ray, "start", "--address", gcs),
                *("--node-ip-address", host.address, *PROCESSES),
            )
        serve = await start(
            *(f"{BIN}/homer", "serve", "--address", gcs, "--model", str(MODEL_DIR)),
            *("--cpu", "--threads", "1", "--workers", "2", "--placement", "strict-spread"),
            *("--host", "0.0.0.0", "--worker-host", f"{SUBNET}.0/24", "--port", "0"),
            out=asyncio.subprocess.PIPE,
        )
        assert serve.stdout is not None
        address = ""
        async with asyncio.timeout(START_SECONDS):
            while not address:
                line = (await serve.stdout.readline()).decode()
                if not line:
                    raise RuntimeError("homer serve ended before it served")
                if line.startswith("homer serves"):
                    address = line.split(" at ")[1].split()[0]
        found = await asyncio.to_thread(ask, address)
        serve.terminate()
        async with asyncio.timeout(START_SECONDS):
            return {**found, "exit": await serve.wait()}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1]))))
