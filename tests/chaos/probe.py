"""`python -m tests.chaos.probe`: what gets through a network of namespaces, fault by fault.

For the test that the faults are real. Prints JSON: for each fault, and after it was healed, the
seconds that an echo took from each asker to the host that fails, null where none came.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from tests.chaos.namespaces import NamespaceHost, Network

PORT = 5000
ECHO_BYTES = 20_000
ECHO_SECONDS = 2.0

_SERVER = f"""
import socket, sys
listening = socket.create_server((sys.argv[1], {PORT}))
print("up", flush=True)
while True:
    connection, _ = listening.accept()
    try:
        while data := connection.recv(65536):
            connection.sendall(data)
    except OSError:
        pass
"""
_CLIENT = f"""
import socket, sys, time
started = time.monotonic()
try:
    with socket.create_connection((sys.argv[1], {PORT}), {ECHO_SECONDS}) as connection:
        connection.settimeout({ECHO_SECONDS})
        for _ in range({ECHO_BYTES} // 1000):
            connection.sendall(b"x" * 1000)
            left = 1000
            while left:
                left -= len(connection.recv(left))
        print(time.monotonic() - started)
except OSError:
    print("nan")
"""


async def python(prefix: list[str], code: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *prefix, sys.executable, "-c", code, *arguments, stdout=asyncio.subprocess.PIPE
    )


async def echo(prefix: list[str], address: str) -> float | None:
    """Seconds of an echo from where `prefix` starts a process."""
    process = await python(prefix, _CLIENT, address)
    assert process.stdout is not None
    said = (await process.stdout.read()).decode().strip()
    await process.wait()
    return None if said == "nan" else float(said)


async def probe() -> dict[str, dict[str, float | None]]:
    network = Network()
    await network.open()
    asker = await network.add_host("asker")
    asked = await network.add_host("asked", interfaces=2)
    server = await python(asked.inside, _SERVER, asked.address)
    assert server.stdout is not None
    await server.stdout.readline()
    try:
        out = {"whole": await both(asker, asked)}
        for kind in sorted(NamespaceHost.kinds):
            await asked.fail(kind)
            out[kind] = await both(asker, asked)
            await asked.heal()
            # A cut link takes the system a moment to believe in again.
            out[f"{kind}, healed"] = await healed(asker, asked)
    finally:
        server.kill()
        await server.wait()
    return out


async def both(asker: NamespaceHost, asked: NamespaceHost) -> dict[str, float | None]:
    """An echo from the switch's own address, and one from another host."""
    coordinator, worker = await asyncio.gather(
        echo([], asked.address), echo(asker.inside, asked.address)
    )
    return {"coordinator": coordinator, "worker": worker}


async def healed(asker: NamespaceHost, asked: NamespaceHost) -> dict[str, float | None]:
    deadline = time.monotonic() + 10
    while True:
        got = await both(asker, asked)
        if None not in got.values() or time.monotonic() > deadline:
            return got


if __name__ == "__main__":
    print(json.dumps(asyncio.run(probe())))
