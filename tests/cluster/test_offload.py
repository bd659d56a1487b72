"""A service whose workers keep their layers on disk answers as one with all of them in memory."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from cluster.client import HomerClient
from cluster.launch import LOOPBACK, running_service
from cluster.options import ServeOptions
from homer.load_options import LoadOptions
from homer.v1 import long_context_pb2 as pb
from tests.cluster.test_service import CONTEXT, QUESTION


def test_workers_with_layers_on_disk_give_the_same_answer(
    service: HomerClient, text_model: Path, tmp_path: Path
) -> None:
    *_, expected = service.generate(
        context=CONTEXT, question=QUESTION, sampling={"max_tokens": 12}, return_kept_indices=True
    )
    load = LoadOptions(
        device="cpu",
        device_map="auto",
        # Room for little more than the embeddings.
        max_memory=json.dumps({"cpu": "200KB"}),
        offload_folder=str(tmp_path),
    )
    options = ServeOptions(
        model=str(text_model), cpu=True, workers=2, port=0, name=uuid.uuid4().hex,
        worker_host=LOOPBACK, load=load,
    )  # fmt: skip
    with running_service(options) as address, HomerClient(address) as client:
        *_, summary = client.generate(
            context=CONTEXT,
            question=QUESTION,
            sampling={"max_tokens": 12},
            return_kept_indices=True,
        )
    assert isinstance(expected, pb.Summary)
    assert isinstance(summary, pb.Summary)
    assert list(summary.token_ids) == list(expected.token_ids)
    assert list(summary.kept_context_indices) == list(expected.kept_context_indices)
    assert len(summary.nodes_by_worker) == 2
