"""`homer plan`, as it is called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from homer import HomerConfig, MergePlan
from homer.config import PlanKind
from tests.golden_cases import model_dir

HOMER = [sys.executable, "-c", "from cluster.cli import main; main()"]


def run_plan(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*HOMER, "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_table_shows_leaves_levels_layers_tokens_bytes_and_flops() -> None:
    done = run_plan("--context-tokens", "65536", "--paper")
    assert done.returncode == 0, done.stderr
    assert "65,569 tokens (1 prefix + 65,536 context + 32 suffix)" in done.stdout
    assert "64 of at most 1,024 context tokens" in done.stdout
    for text in ("full attention's 32.0 GiB", "of full attention's 2.0 P", "│ leaves ", "│ root "):
        assert text in done.stdout
    for text in (
        "4,096 positions (given)",
        "2,048 tokens (half of",
        "12 of 32 (3/8 of the layers)",
    ):
        assert text in done.stdout
    assert "paper; the question is averaged at merges" in done.stdout
    assert "leaf 0 " not in done.stdout
    given = ["--context-tokens", "65536", "--max-initial-chunk-len", "1500", "--tree"]
    other = run_plan(*given).stdout
    assert "leaf 30 " in other
    for text in ("1,500 tokens", "balanced; the question is run again at the root"):
        assert text in other


@pytest.mark.parametrize("kind", ["balanced", "paper"])
def test_json_is_the_plan_of_the_model_whose_config_is_read(kind: PlanKind, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_dir("B") / "config.json").read_bytes())
    lengths = ["--context-tokens", "9000", "--prefix-tokens", "3", "--suffix-tokens", "5"]
    settings = ["--max-chunk-len", "512", "--target-len", "300", "--warmup-layers", "4"]
    flags = ["--json", *(["--paper"] if kind == "paper" else [])]
    done = run_plan(*lengths, *settings, *flags, "--model", tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    config = HomerConfig(
        max_chunk_len=512,
        target_len=300,
        warmup_layers=4,
        plan=kind,
        refresh_suffix=kind == "balanced",
    )
    plan = MergePlan.build(3, 9000, 5, 12, config)
    assert summary["leaves"] == len(plan.leaves)
    assert summary["kept_tokens"] == plan.kept_len
    assert summary["config"] == vars(config)
    assert summary["window"] == 4096
    assert set(summary["setting_sources"].values()) == {"given"}
    assert [(level["layer_start"], level["layer_end"]) for level in summary["levels"]] == sorted(
        {(node.layer_start, node.layer_end) for node in plan.nodes}
    )
    assert 0 < summary["flops_ratio"] < 1


def test_a_model_s_settings_come_with_where_they_are_from_and_without_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_dir("B") / "config.json").read_bytes())
    command = (
        "from cluster.cli import app; import sys; app(sys.argv[1:], standalone_mode=False); "
        "print('slow imports:', {'torch', 'transformers'} & set(sys.modules))"
    )
    arguments = ["plan", "--model", str(tmp_path), "--context-tokens", "9000"]
    run = [sys.executable, "-c", command, *arguments]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for text in (
        "slow imports: set()",
        "2,048 tokens (half of the window)",
        "4 of 12 (3/8 of the layers)",
        "score          max_logit",
        "no calibration bias",
    ):
        assert text in done.stdout
    (tmp_path / "bias.safetensors").touch()
    (tmp_path / "homer.json").write_text(
        '{"warmup_layers": 5, "max_chunk_len": 99, "target_len": 90}'
    )
    found = run_plan("--model", tmp_path, "--context-tokens", "9000", "--target-len", "80").stdout
    for text in ("5 of 12 (homer.json)", "99 tokens (homer.json)", "80 tokens (given)"):
        assert text in found
    assert "by bias.safetensors beside it" in found
    other = json.loads(
        run_plan(
            "--model", tmp_path, "--context-tokens", "90", "--score", "key_norm", "--json"
        ).stdout
    )
    assert (other["config"]["score"], other["calibrated"]) == ("key_norm", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context-tokens", "0"], "the context is empty"),
        (["--context-tokens", "9000", "--max-chunk-len", "20"], "raise max_chunk_len above 33"),
        (["--context-tokens", "90", "--model", "/nowhere"], "'/nowhere' is no folder"),
        (["--context-tokens", "90", "--model", "m", "--layers", "4"], "leave out num_layers"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_change(arguments: list[str], message: str) -> None:
    done = run_plan(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
