from __future__ import annotations

import os
from pathlib import Path

import pytest

from homer.errors import ConfigError
from workers.security import Security
from workers.tokens import Tokens, own_token

ANNA, BERT = "anna-has-this-token", "bert-has-another-one"


def test_a_token_is_known_by_its_name() -> None:
    tokens = Tokens(f"# who\n\nanna={ANNA}\n  bert = {BERT}== \n")
    assert tokens.name_of(f"Bearer {ANNA}") == "anna"
    assert tokens.name_of(f"bearer  {BERT}==") == "bert"
    assert tokens.first == ANNA
    wrong = [
        "",
        "Bearer",
        ANNA,
        f"Basic {ANNA}",
        f"Bearer {ANNA}x",
        f"Bearer {ANNA[:-1]}",
        "Bearer é",
    ]
    assert [tokens.name_of(header) for header in wrong] == [None] * len(wrong)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("", "has no tokens; write a line NAME=TOKEN"),
        ("# none", "has no tokens"),
        (ANNA, "line 1: write NAME=TOKEN"),
        ("anna=short", "line 1: write NAME=TOKEN, the token of 16 or more"),
        ("a b=sixteen-characters", "line 1"),
        (f"\nanna={ANNA} {BERT}", "line 2"),
        (f"anna={ANNA}\nanna={BERT}", "line 2: its name or its token is there twice"),
        (f"anna={ANNA}\nbert={ANNA}", "line 2: its name or its token is there twice"),
    ],
)
def test_a_wrong_line_is_named_without_what_it_says(lines: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        Tokens(lines)
    assert ANNA not in str(caught.value)
    assert "short" not in str(caught.value)


def test_a_file_counts_as_it_is_now_and_a_broken_one_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"anna={ANNA}\n")
    tokens = Tokens(path=str(file))
    file.write_text(f"anna={ANNA}\nbert={BERT}\n")
    assert tokens.name_of(f"Bearer {BERT}") == "bert"
    file.write_text("half a li")
    assert tokens.name_of(f"Bearer {BERT}") == "bert"
    file.unlink()
    assert tokens.name_of(f"Bearer {BERT}") == "bert"
    # As secrets are swapped where they are mounted.
    new = tmp_path / "new"
    new.write_text(f"bert={BERT}\n")
    os.replace(new, file)  # noqa: PTH105 - the call that is meant
    assert tokens.name_of(f"Bearer {ANNA}") is None
    assert tokens.name_of(f"Bearer {BERT}") == "bert"


def test_the_own_token_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOMER_TOKEN", raising=False)
    assert own_token(None, "HOMER_TOKEN") is None
    monkeypatch.setenv("HOMER_TOKEN", BERT)
    assert own_token(None, "HOMER_TOKEN") == BERT
    file = tmp_path / "token"
    for text, token in (
        (f"{ANNA}\n", ANNA),
        (f"# mine\nanna={ANNA}\n", ANNA),
        (f"{ANNA}=", f"{ANNA}="),
    ):
        file.write_text(text)
        assert own_token(file, "HOMER_TOKEN") == token
    file.write_text(f"anna={ANNA}\nbert={BERT}")
    with pytest.raises(ConfigError, match="has 2 tokens; write only the one to call with"):
        own_token(file, "HOMER_TOKEN")
    with pytest.raises(ConfigError, match="cannot read the token file"):
        own_token(tmp_path / "absent", "HOMER_TOKEN")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.7", "example.org"])
def test_without_a_token_only_the_loopback_is_listened_on(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--tokens-file.*127.0.0.1.*--insecure-no-token"):
        Security().check_host(host)
    Security(insecure_no_token=True).check_host(host)
    Security(tokens=f"anna={ANNA}").check_host(host)
    for own in ("127.0.0.1", "::1", "[::1]", "localhost", "127.8.0.1"):
        Security().check_host(own)


def test_tokens_are_in_no_repr() -> None:
    assert ANNA not in repr(Security(tokens=f"anna={ANNA}"))
