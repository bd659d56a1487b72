"""`python -m tests.homer.ranks_table`: which models two ranks split right, by which engine.

Every model of the families' tests, on the CPU: "same" where both ranks keep and answer what one
process does, else why it is refused. Ends with 1 where a model is run and answers otherwise.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from homer.engines import Engine
from tests.homer.families.zoo import MODELS
from tests.homer.test_parallel import PLAIN, assert_same, in_one_process, run_ranks

ENGINES: tuple[Engine, ...] = ("deepspeed-tp", "transformers-tp")


def main() -> int:
    wrong = 0
    for engine in ENGINES:
        with tempfile.TemporaryDirectory() as folder:
            ranks = run_ranks(Path(folder), 2, [(name, engine, PLAIN) for name in MODELS])
        for number, name in enumerate(MODELS):
            said = [rank[number] for rank in ranks]
            verdict = said[0].get("refused", "").split(";")[0]
            if not verdict:
                expected = in_one_process(name, None)
                parts = round(expected[0]["cache_bytes"] / said[0]["answers"][0]["cache_bytes"])
                try:
                    assert_same(expected, said, parts)
                    verdict = f"same, with 1/{parts} of the cache on each"
                except AssertionError:
                    verdict = "ANOTHER ANSWER"
                    wrong += 1
            print(f"{engine:16} {name:20} {verdict}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
