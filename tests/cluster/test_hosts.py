"""`homer serve` on hosts with addresses of their own: Ray, the door, and between workers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from cluster.text import PromptTokenizer
from homer import HomerModel
from homer.demo import MODEL_DIR
from homer.shape import BIAS_FILE, homer_defaults
from tests.chaos import namespaces
from tests.cluster.processes import REPOSITORY, sandbox
from tests.cluster.ray_hosts import CONTEXT, NEW_TOKENS, QUESTION


def test_workers_of_two_hosts_answer_as_one_process() -> None:
    if why_not := namespaces.missing():
        pytest.skip(why_not)
    with sandbox() as box:
        command = [sys.executable, "-m", "tests.cluster.ray_hosts", str(box.folder)]
        done = subprocess.run(
            namespaces.inside(command),
            cwd=REPOSITORY, env=box.env, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        log = (box.folder / "log").read_text(errors="replace")[-5000:]
    assert done.returncode == 0, f"{done.stderr}\n{log}"
    seen = json.loads(done.stdout)
    hosts = {address.rpartition(":")[0] for address in seen["workers"].values()}
    assert hosts == {f"{namespaces.SUBNET}.2", f"{namespaces.SUBNET}.3"}
    assert set(seen["nodes"]) == set(seen["workers"])

    tokenizer = PromptTokenizer.load(str(MODEL_DIR))
    assert tokenizer is not None
    model = HomerModel.from_pretrained(
        MODEL_DIR, homer_defaults(MODEL_DIR), MODEL_DIR / BIAS_FILE, device="cpu"
    )
    ids = tokenizer.prompt_ids("", CONTEXT, QUESTION)
    prefix, context, suffix = (torch.tensor(part) for part in ids)
    expected = model.generate(model.compress(prefix, context, suffix), max_new_tokens=NEW_TOKENS)
    assert seen["tokens"] == expected.tolist()
    assert seen["exit"] == 0
