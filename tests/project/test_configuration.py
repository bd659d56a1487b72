"""Options from the command line, variables and a file; and what `docs/cli.md` says of them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cluster.cli import app
from cluster.cli.config_file import option_names, read_defaults
from cluster.cli.exit_codes import MEANINGS
from cluster.options import ServeOptions
from homer.errors import ConfigError
from tests.project.command_line import Homer, homer

__all__ = ["homer"]

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
EXAMPLE = PAGE.split("```toml\n")[1].split("```")[0]


def commands(
    group: Any = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands that can be run, by their names from the top."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def planned(homer: Homer, *arguments: str | Path) -> dict[str, Any]:
    done = homer(*arguments)
    assert done.code == 0, done.stderr
    config: dict[str, Any] = json.loads(done.stdout)["config"]
    return config


def test_the_command_line_goes_before_variables_these_before_the_file_and_that_before_defaults(
    homer: Homer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "homer.toml"
    file.write_text(
        "max_chunk_len = 111\nwarmup-layers = 5\n"
        "[plan]\ncontext-tokens = 9000\nwarmup-layers = 6\nfan-in = 3\njson = true\n"
    )
    monkeypatch.setenv("HOMER_PLAN_TARGET_LEN", "333")
    monkeypatch.setenv("HOMER_PLAN_FAN_IN", "4")
    config = planned(homer, "--config", file, "plan", "--fan-in", "5")
    assert config["max_chunk_len"] == 111
    assert config["warmup_layers"] == 6
    assert config["target_len"] == 333
    assert config["fan_in"] == 5
    assert config["max_initial_chunk_len"] is None
    # The file itself by its variable; a switch off again where the file has it on.
    monkeypatch.setenv("HOMER_CONFIG", str(file))
    assert planned(homer, "plan")["fan_in"] == 4
    assert "context tokens" in homer("plan", "--no-json").stdout
    monkeypatch.setenv("HOMER_JSON", "0")
    assert not homer("plan").stdout.startswith("{")


def test_a_yaml_file_says_the_same(homer: Homer, tmp_path: Path) -> None:
    file = tmp_path / "homer.yaml"
    file.write_text("target-len: 222\nplan:\n  context-tokens: 9000\n  paper: true\n")
    config = planned(homer, "--config", file, "plan", "--json")
    assert (config["target_len"], config["plan"]) == (222, "paper")


def test_each_option_has_a_variable_that_its_help_shows_under_the_option_s_name() -> None:
    seen = 0
    for path, command in commands():
        prefix = "_".join(("HOMER", *path)).upper().replace("-", "_")
        for option, name in option_names(command).items():
            (parameter,) = (one for one in command.params if one.name == name)
            assert parameter.show_envvar
            if option != "json":
                assert parameter.allow_from_autoenv
                assert f"{prefix}_{name}".upper() == f"{prefix}_{option.replace('-', '_')}".upper()
            seen += 1
    assert seen > 100


def test_each_command_that_prints_a_result_can_print_json() -> None:
    without = [path for path, command in commands() if "json" not in option_names(command)]
    assert without == []


def test_an_option_of_every_command_can_be_set_by_the_file(tmp_path: Path) -> None:
    """The file's values arrive where the parser looks for them, under each parameter's own name."""
    file = tmp_path / "homer.toml"
    for path, command in commands():
        names = option_names(command)
        file.write_text(f"[{'.'.join(path)}]\n" + "".join(f'{one} = "{one}"\n' for one in names))
        defaults: Any = read_defaults(file, typer.main.get_command(app))
        for part in path:
            defaults = defaults[part]
        assert defaults == {name: option for option, name in names.items()}


def test_the_example_of_the_documents_starts_a_service_with_what_it_says(
    homer: Homer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "homer.toml"
    file.write_text(EXAMPLE)
    started: list[ServeOptions] = []

    def note(address: str | None, options: ServeOptions, **more: Any) -> Any:
        started.append(options)
        raise ConfigError("far enough")

    monkeypatch.setattr("cluster.launch.ray_cluster", note)
    monkeypatch.setenv("HOMER_TOKENS", "anna=the-token-that-anna-has")
    assert homer("--config", file, "serve", "--workers", "2").stderr == "homer: far enough\n"
    (options,) = started
    written = tomllib.loads(EXAMPLE)
    assert options.model == written["model"]
    assert options.compression.given() == {"max_chunk_len": 2048, "target_len": 2048}
    assert (options.host, options.workers) == ("0.0.0.0", 2)
    assert options.grace_seconds == 120
    assert options.labels == written["serve"]["labels"]
    assert options.port == ServeOptions(model="").port


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle = 1", "there is no option modle outside of sections; did you mean model?"),
        ("[serve]\nwrokers = 1", "no option wrokers in section [serve]; did you mean workers?"),
        ("[sreve]\nworkers = 1", "no option sreve outside of sections; did you mean serve?"),
        ("[bench.speed]\nmodel = 1", "no option model in section [bench.speed]"),
        ("[plan]\nconfig = 'x'", "no option config in section [plan]"),
        ("serve = 1", "serve is a command; its options go into a section [serve]"),
        ("[plan", "cannot read the configuration file"),
        ("[plan]\ncontext-tokens = 'many'", "'--context-tokens': Input should be a valid integer"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(
    homer: Homer, tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "homer.toml"
    file.write_text(content)
    done = homer("--config", file, "plan")
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_value_that_does_not_fit_is_said_to_be_the_file_s_or_a_variable_s(
    homer: Homer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "homer.yml"
    file.write_text("plan: {context-tokens: many}")
    assert "(from the configuration file)" in homer("--config", file, "plan").stderr
    monkeypatch.setenv("HOMER_PLAN_CONTEXT_TOKENS", "few")
    assert "(from its variable)" in homer("--config", file, "plan").stderr
    for content in ("- a\n- b", "a: [", ""):
        file.write_text(content)
        done = homer("--config", file, "plan", "--context-tokens", "900")
        assert (done.code == 2) == bool(content)
        assert done.stderr.count("\n") == bool(content)


def test_a_file_that_is_named_behind_the_command_is_told_where_it_goes(homer: Homer) -> None:
    for words, command in ((["plan"], "plan"), (["bench", "speed"], "bench speed")):
        done = homer(*words, "--config", "homer.toml")
        assert (done.code, done.stdout) == (2, "")
        assert f"--config goes before the command: homer --config FILE {command} …" in done.stderr
        assert done.stderr.count("\n") == 1


def test_of_a_model_in_the_file_and_a_server_on_the_command_line_the_latter_counts(
    homer: Homer, tmp_path: Path
) -> None:
    (tmp_path / "homer.toml").write_text("model = 'x'")
    (tmp_path / "words.txt").write_text("Words.")
    ask = ["generate", "--context", "words.txt", "--question", "?"]
    done = homer("--config", "homer.toml", *ask, "--server", "127.0.0.1:9")
    assert (done.code, done.stdout) == (3, "")
    assert "no Homer service answers at 127.0.0.1:9" in done.stderr
    both = homer(*ask, "--server", "127.0.0.1:9", "--model", "x")
    assert both.code == 2
    assert "give either --model or --server" in both.stderr


def test_the_documents_name_every_command_and_exit_code() -> None:
    named = set(re.findall(r"^\| `homer (\w+)` \|", PAGE, flags=re.MULTILINE))
    assert named == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    codes = dict(re.findall(r"^\| (\d+) \| (.*) \|$", PAGE, flags=re.MULTILINE))
    assert codes == {str(int(code)): text for code, text in MEANINGS.items()}


def test_completion_can_be_shown_and_knows_commands_and_options(
    homer: Homer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_HOMER_COMPLETE", "complete_bash")
    for words, expected in (
        ("homer gen", "generate"),
        ("homer plan --max-ch", "--max-chunk-len"),
        ("homer serve --engine transf", "transformers-tp"),
        ("homer plan --score max", "max_logit"),
        ("homer serve --address au", "auto"),
        ("homer status --server 127", "127.0.0.1:50051"),
        ("homer chat --server 127", "127.0.0.1:50051"),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        assert expected in homer().stdout.split()
