"""What a body of OpenAI's asks of the gRPC service.

The HTTP door and batches share it. Knows nothing about HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.http.answers import Answer
from cluster.http.bodies import ChatBody, CompletionBody
from cluster.http.chat import Prompt, PromptBuilder
from cluster.http.errors import HttpError
from cluster.text import PromptTokenizer
from homer.errors import ModelError
from homer.v1 import long_context_pb2 as pb


@dataclass(frozen=True)
class Asked:
    """A body as the arguments of a client's `generate`, and the answer to be made of its events."""

    request: dict[str, Any]
    answer: Answer


@dataclass(frozen=True)
class Served:
    """What a gRPC service serves."""

    name: str
    info: pb.GetServerInfoResponse
    prompts: PromptBuilder

    @classmethod
    def of(cls, info: pb.GetServerInfoResponse, name: str = "", tokenizer: str = "") -> Served:
        """What a service says of itself.

        Parameters
        ----------
        info
        name : str
            What requests call the model; by default a model id as it is, and a folder by its last
            part.
        tokenizer : str
            Folder or model id of the tokenizer, where the service's model is not found here.

        Raises
        ------
        ModelError
            When the tokenizer is not found.
        """
        loaded = PromptTokenizer.load(tokenizer or info.model)
        if loaded is None:
            raise ModelError(
                f"the model {tokenizer or info.model} has no tokenizer, without which nobody can "
                "tell document and question apart; put its tokenizer files beside it"
            )
        folder = Path(info.model)
        name = name or (folder.resolve().name if folder.is_dir() else info.model)
        return cls(name, info, PromptBuilder(loaded, info.max_chunk_len))

    def asked(self, body: ChatBody | CompletionBody, request_id: str) -> Asked:
        """What `body` asks. Takes seconds for a long document, which is tokenized here.

        Raises
        ------
        HttpError, PromptError
            When it cannot be asked.
        """
        chat = isinstance(body, ChatBody)
        if body.model not in (self.name, self.info.model):
            raise HttpError(
                404,
                f"the model {body.model!r} does not exist; this service has {self.name!r}",
                code="model_not_found",
                param="model",
            )
        prompt = self._prompt(body)
        ids = prompt.ids
        longest = self.info.max_context_tokens
        if len(ids.context) > longest:
            raise HttpError(
                400,
                f"the document has {len(ids.context)} tokens; this service takes at most {longest}",
                code="context_length_exceeded",
                param="messages" if chat else "prompt",
            )
        request: dict[str, Any] = {
            "prefix": ids.prefix,
            "context": ids.context,
            "question": ids.suffix,
            "request_id": request_id,
            "sampling": body.sampling,
            "compression": body.homer.compression,
            "return_kept_indices": body.homer.return_kept_indices,
            "return_evidence": body.homer.return_evidence,
            "priority": body.homer.priority,
        }
        answer = Answer(
            "chat" if chat else "completion",
            ("chatcmpl-" if chat else "cmpl-") + request_id,
            self.name,
            body.homer,
            prompt.document,
        )
        return Asked(request, answer)

    def _prompt(self, body: ChatBody | CompletionBody) -> Prompt:
        located = body.homer.return_evidence
        if isinstance(body, CompletionBody):
            marked = body.homer.prefix, body.homer.question
            return self.prompts.completion(body.prompt, *marked, located)
        if body.homer.prefix is not None or body.homer.question is not None:
            raise HttpError(
                400,
                "prefix and question are for completions; in a chat they are the system message "
                "and the last content part",
                param="homer",
            )
        return self.prompts.chat(body.messages, body.chat_template_kwargs, located)
