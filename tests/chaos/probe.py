"""`python -m tests.chaos.probe`: what gets through a network of namespaces, fault by fault.

For the test that the faults are real. Prints JSON: for each fault, and after it was healed, the
seconds of each echo that came to each asker from the host that fails. What a fault lets through is
asked again until it has come, since any one echo may be late or lost on a busy machine.
"""

from __future__ import annotations

import asyncio
import json
import sys

from tests.chaos.faults import Kind
from tests.chaos.namespaces import NamespaceHost, Network

PORT = 5000
# One packet, so that a loss is waited out in full.
PIECE_BYTES = 1400
# One after another: an echo has to cross this often, and waits out each piece that is lost.
PIECES = 60
ECHOES = 2
TRIES = 6
ECHO_SECONDS = 15.0
# Nothing comes of these, however long one waits.
HELD_BACK = {
    Kind.CUT: {"coordinator", "worker"},
    Kind.BLINK: {"coordinator", "worker"},
    Kind.CUT_PEERS: {"worker"},
}
HELD_BACK_SECONDS = 1.5

_SERVER = f"""
import socketserver, sys
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        try:
            while data := self.request.recv(65536):
                self.request.sendall(data)
        except OSError:
            pass
with socketserver.ThreadingTCPServer((sys.argv[1], {PORT}), Echo) as server:
    print("up", flush=True)
    server.serve_forever()
"""
_CLIENT = f"""
import socket, sys, time
started = time.monotonic()
try:
    with socket.create_connection((sys.argv[1], {PORT}), float(sys.argv[2])) as connection:
        for _ in range({PIECES}):
            connection.sendall(b"x" * {PIECE_BYTES})
            left = {PIECE_BYTES}
            while left:
                got = len(connection.recv(left))
                if not got:
                    raise OSError("closed")
                left -= got
        print(time.monotonic() - started)
except OSError:
    print("nan")
"""


async def python(prefix: list[str], code: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *prefix, sys.executable, "-c", code, *arguments, stdout=asyncio.subprocess.PIPE
    )


async def echo(prefix: list[str], address: str, seconds: float) -> float | None:
    """Seconds of an echo from where `prefix` starts a process, None where it did not come."""
    process = await python(prefix, _CLIENT, address, str(seconds))
    assert process.stdout is not None
    said = (await process.stdout.read()).decode().strip()
    await process.wait()
    return None if said == "nan" else float(said)


async def echoes(prefix: list[str], address: str, *, held_back: bool) -> list[float]:
    """Seconds of the echoes that came."""
    if held_back:
        got = await echo(prefix, address, HELD_BACK_SECONDS)
        return [] if got is None else [got]
    came: list[float] = []
    for _ in range(TRIES):
        if (got := await echo(prefix, address, ECHO_SECONDS)) is not None:
            came.append(got)
        if len(came) == ECHOES:
            break
    return came


async def probe() -> dict[str, dict[str, list[float]]]:
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
            out[kind] = await both(asker, asked, HELD_BACK.get(kind))
            await asked.heal()
            out[f"{kind}, healed"] = await both(asker, asked)
    finally:
        server.kill()
        await server.wait()
    return out


async def both(
    asker: NamespaceHost, asked: NamespaceHost, held_back: set[str] | None = None
) -> dict[str, list[float]]:
    """Echoes to the switch's own address, and to another host."""
    askers = {"coordinator": [], "worker": asker.inside}
    came = await asyncio.gather(
        *(
            echoes(prefix, asked.address, held_back=who in (held_back or ()))
            for who, prefix in askers.items()
        )
    )
    return dict(zip(askers, came, strict=True))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(probe())))
