"""One Ray cluster for all tests that need one, and services on it."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cluster.client import HomerClient
from cluster.launch import LOOPBACK, ray_cluster, running_service
from cluster.options import ServeOptions
from cluster.worker_client import GrpcWorkerClient
from homer.v1 import worker_pb2_grpc
from tests.golden_cases import model_dir
from workers.channels import Credentials

T = TypeVar("T")

# More than any test takes at once; Ray does not look whether the machine has as many.
LOGICAL_CPUS = 32
DEADLINE_SECONDS = 60.0
# What the workers of services ask for that tests look into.
WORKER_TOKEN = "the-token-of-workers-in-tests"
# Short, since each character is a token; like many it trims what is said.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def poll(condition: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.02)


@contextmanager
def worker_stub(address: str) -> Iterator[worker_pb2_grpc.WorkerStub]:
    """For calls to a service's worker, past the service."""
    channel = Credentials(WORKER_TOKEN).channel(address, ())
    try:
        yield worker_pb2_grpc.WorkerStub(channel)
    finally:
        channel.close()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """This process is joined to a local Ray cluster."""
    with ray_cluster(None, ServeOptions(model="", cpu=True, workers=LOGICAL_CPUS)):
        yield


@asynccontextmanager
async def connected(addresses: list[str]) -> AsyncIterator[list[GrpcWorkerClient]]:
    """Clients of workers, for the event loop that runs now."""
    clients = [GrpcWorkerClient(f"worker-{n}", address) for n, address in enumerate(addresses)]
    try:
        yield clients
    finally:
        for client in clients:
            await client.close()


Run = Callable[[Coroutine[Any, Any, T]], T]


@pytest.fixture(scope="session")
def run() -> Iterator[Run[Any]]:
    """Runs coroutines in the one event loop of this process that uses asynchronous gRPC."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run_there(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    yield run_there
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden model B with a tokenizer of bytes, a beginning-of-sequence token, a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    words += [f"w{number}" for number in range(len(words), 320)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    folder = tmp_path_factory.mktemp("text-model") / "B"
    shutil.copytree(model_dir("B"), folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    (folder / "homer.json").write_text(
        '{"max_chunk_len": 64, "target_len": 64, "warmup_layers": 3}', encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="session")
def service(ray_session: None, text_model: Path) -> Iterator[HomerClient]:
    """A client of a service of two workers with a tokenizer."""
    options = ServeOptions(
        model=str(text_model),
        cpu=True,
        workers=2,
        port=0,
        name="shared",
        worker_host=LOOPBACK,
        worker_token=WORKER_TOKEN,
    )
    with ExitStack() as stack:
        address = stack.enter_context(running_service(options))
        yield stack.enter_context(HomerClient(address))
