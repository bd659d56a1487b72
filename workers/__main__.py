"""`python -m workers --model PATH`: one worker process, without Ray.

Prints one line when it is ready: `homer-worker ready host=… port=… pid=…`, and
`metrics_port=…` where there are metrics. Where the model's files are missing or damaged the line
says `failed` instead: the process stays, reports that by gRPC, and is ready when there are others.
Everything else goes to stderr. SIGTERM or SIGINT makes it finish what runs and end; a second one
ends it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from homer.errors import BiasError, CheckpointError, HomerError
from homer.load_options import LOAD_HELP, TOKEN_FILE_HELP, LoadOptions, read_token
from workers.collector import not_collecting
from workers.logs import set_up_logging
from workers.options import WorkerOptions
from workers.security import SECURITY_HELP, Security
from workers.tls import SERVER_NAME_HELP, Tls

if TYPE_CHECKING:
    from workers.server import WorkerServer

EXIT_MISTAKE = 2

_HELP = {
    "model": "folder in Hugging Face format, or model id",
    "host": "address, network (10.1.0.0/16) or interface (eth1) on which others reach it",
    "port": "port to listen on; 0 takes a free one",
    "role": "full; or leaf: load only the lowest --leaf-layers and run leaves that need no more",
    "leaf_layers": "layers of a leaf worker, as many as leaves run (homer plan shows them)",
    "threads": "threads of a model run on the CPU; 0 leaves it to torch",
    "engine": "torch; deepspeed-tp or transformers-tp (with --ranks); or deepspeed-zero3",
    "ranks": "processes of this machine that together are this worker",
    "zero_offload": "where deepspeed-zero3 keeps weights: none, cpu, or a folder",
    "bias": "calibration bias file; by default the one beside the model",
    "memory_budget": "what requests may take, like 4GiB; auto: 4/5 of what is free; 0: no limit",
    "memory_share": "part of the memory that auto counts on, where several workers share it",
    "idle_seconds": "a request of which nothing is heard for so long is dropped",
    "grace_seconds": "how long running calls may take to end on SIGTERM",
    "name": "what it is called in logs and spans",
    "log_format": "text, or json: one object per line",
    "metrics_port": "port of its Prometheus metrics; 0 takes a free one; by default there is none",
    "transport": "auto: tensors of workers of this machine come through shared memory; or grpc",
    "wire_dtype": "type in which floats travel: auto (as they are), bfloat16, float16 or float8",
    "peer_stall_seconds": "how long another worker may send nothing while it is waited for",
    "otlp_endpoint": "OpenTelemetry collector for spans, like http://127.0.0.1:4317",
}


def parse_options(arguments: list[str] | None = None) -> WorkerOptions:
    """Options from a command line; names and defaults are those of `WorkerOptions`.

    Those of `LoadOptions` and `Security` are among them; of tokens only files are named.
    """
    parser = argparse.ArgumentParser(prog="python -m workers", description="Serve a worker.")
    groups = ("load", "security", "metrics_security")
    ours = [field for field in dataclasses.fields(WorkerOptions) if field.name not in groups]
    loads = [field for field in dataclasses.fields(LoadOptions) if field.name in LOAD_HELP]
    for field in (*ours, *loads):
        name = "--" + field.name.replace("_", "-")
        text = {**_HELP, **LOAD_HELP}[field.name]
        if field.default is dataclasses.MISSING:
            parser.add_argument(name, required=True, help=text)
        elif field.type == "bool":
            parser.add_argument(name, action="store_true", help=text)
        else:
            default = field.default
            kind = int if str(field.type).startswith("int") else type(default or "")
            shown = "" if default is None else f" (default: {default})"
            parser.add_argument(name, type=kind, default=default, help=text + shown)
    parser.add_argument("--hub-token-file", help=TOKEN_FILE_HELP)
    for name, text in SECURITY_HELP.items():
        action = "store_true" if name == "insecure_no_token" else "store"
        parser.add_argument("--" + name.replace("_", "-"), action=action, help=text)
    parser.add_argument("--tls-server-name", help=SERVER_NAME_HELP)
    given = vars(parser.parse_args(arguments))
    token = read_token(given.pop("hub_token_file"))
    load = LoadOptions(token=token, **{field.name: given.pop(field.name) for field in loads})
    tls = Tls.given(*(given.pop(f"tls_{name}") for name in ("ca", "cert", "key", "server_name")))
    security = Security.given(given.pop("tokens_file"), tls, given.pop("insecure_no_token"))
    return WorkerOptions(load=load, security=security, **given)


async def serve(options: WorkerOptions) -> None:
    """Serve until a signal comes."""
    # Here, so that help and mistakes do not wait for torch.
    with not_collecting():
        import transformers

        from workers.server import WorkerServer

    # Nobody watches a worker load; its log should hold whole lines.
    transformers.utils.logging.disable_progress_bar()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    server = WorkerServer(options)
    starting = asyncio.create_task(_start(server))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        # A load cannot be interrupted, and nothing is lost by ending in the middle of it.
        os._exit(EXIT_MISTAKE if server.problem else 0)
    starting.result()
    _tell("ready", server)
    await stopping
    for number in signals:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    logging.getLogger(__package__).info("draining")
    await server.stop()


async def _start(server: WorkerServer) -> None:
    """Serve; where the model's files are at fault, say so to whoever asks until there are others.

    Whoever watches this process would only start it again, and again.
    """
    await server.listen()
    while True:
        files = server.options.watch_files()
        try:
            return await server.load()
        except (CheckpointError, BiasError) as error:
            print(f"error: {error}; it is tried again when files change", file=sys.stderr)
            _tell("failed", server)
            await files.changed()
        except BaseException:
            await server.stop(0)
            raise


def _tell(word: str, server: WorkerServer) -> None:
    metrics = "" if server.metrics_port is None else f" metrics_port={server.metrics_port}"
    print(
        f"homer-worker {word} host={server.host} port={server.port} pid={os.getpid()}{metrics}",
        flush=True,
    )


def main() -> int:
    try:
        options = parse_options()
        set_up_logging(options.log_format, worker=options.name)
        asyncio.run(serve(options))
    except HomerError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
