"""An answer and what it was made from as one HTML file, which needs no service and no network.

It shows what the page at the HTTP door shows, with the same code. Knows nothing about how the
answer was come by.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from pathlib import Path

from cluster.client_wire import message_fields
from homer.v1 import long_context_pb2 as pb

FOLDER = Path(__file__).parent / "http" / "page"
_SHOW = """
const data = JSON.parse(document.getElementById("data").textContent);
new EvidenceView(document.getElementById("evidence")).show(data.document, data.evidence);
"""


def evidence_file(document: str, question: str, summary: pb.Summary) -> str:
    """The file's text, for a summary with evidence."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    script = "".join(
        (FOLDER / name).read_text(encoding="utf-8") for name in ("tree.js", "evidence.js")
    )
    script += _SHOW
    evidence = message_fields(summary.evidence)
    # No text of a document may end the element that it is in.
    data = json.dumps({"document": document, "evidence": evidence}).replace("<", "\\u003c")
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Homer: {escape(question.strip())}</title>
<style>{style}</style>
</head>
<body>
<header><h1>Homer</h1><p>Request {escape(summary.request_id)}</p></header>
<main>
<section class="card">
<h2>{escape(question.strip())}</h2>
<p id="answer">{escape(summary.text.strip())}</p>
<p class="hint">{summary.kept_tokens:,} of {summary.prompt_tokens:,} tokens kept, in
{summary.seconds.total:.2f} s.</p>
</section>
<div id="evidence"></div>
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    """`text` as a source that a content security policy allows."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
