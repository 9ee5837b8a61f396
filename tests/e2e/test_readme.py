"""The README's commands on the real model, as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from hispec.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PROMPT = "Name three planets and say one thing about each."


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hispec.cli", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


def generate(hierarchy: str, *more: str) -> dict:
    done = run(
        *("generate", "--model", "smollm2-135m", "--prompt", PROMPT, "--json"),
        *("--hierarchy", hierarchy, "--max-new-tokens", "48", *more),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("dtype", "presets"), [("bf16", ["layerskip", "hispec"]), ("fp32", ["hispec"])]
)
def test_every_preset_says_what_plain_decoding_says(dtype, presets):
    plain = generate("ar", "--dtype", dtype)
    assert plain["num_tokens"] > 20 and plain["layer_visits_per_token"] == 30
    for name in presets:
        found = generate(name, "--dtype", dtype)
        assert found["token_ids"] == plain["token_ids"]
        assert found["text"] == plain["text"]
        assert [level["name"] for level in found["levels"]][-1] == "target"


def test_a_cut_of_the_adapter_drafts_for_the_original(tmp_path: Path):
    cut = str(tmp_path / "cut8")
    done = run("export", "--model", "smollm2-135m-layerskip", "--cut", "8", "--out", cut)
    assert done.returncode == 0 and "--mode lora" not in done.stderr, done.stderr
    plain, found = generate("ar"), generate("ar", "--level", cut)
    assert found["token_ids"] == plain["token_ids"]
    assert [level["name"] for level in found["levels"]] == ["model cut8", "target"]
    assert found["levels"][0]["accepted"] > 0


def test_text_goes_to_stdout_and_statistics_to_stderr():
    done = run(
        *("generate", "--model", "smollm2-135m", "--prompt", "-", "--stats"),
        *("--max-new-tokens", "16", "--hierarchy", "ar"),
        stdin=PROMPT,
    )
    assert done.returncode == 0
    assert done.stdout.strip() and "tok/s" not in done.stdout
    assert "tok/s" in done.stderr and "layer visits" in done.stderr


def test_chat_remembers_the_turn_before():
    turns = "My name is Ada. Please remember it.\nWhat is my name?\n"
    done = run("chat", "--model", "smollm2-135m", "--max-new-tokens", "40", stdin=turns)
    assert done.returncode == 0, done.stderr
    assert "Ada" in done.stdout


def test_the_readme_names_only_commands_and_options_that_exist():
    text = (ROOT / "README.md").read_text()
    options = defaultdict(set)
    # A command's lines, those continued with a backslash included.
    for line in re.findall(r"^hispec (\w.*(?:\\\n.*)*)", text, re.M):
        words = line.split()
        command = max((c for c in COMMANDS if words[: len(c.split())] == c.split()), key=len)
        options[command] |= set(re.findall(r"--[\w-]+", line))
    assert {"generate", "chat", "doctor", "bench", "train", "ngrams build"} <= set(options)
    for command, named in options.items():
        help_text = run(*command.split(), "--help").stdout
        for option in named:
            assert option in help_text, f"hispec {command} has no {option}"
    for path in re.findall(r"`((?:scripts|hispec|kernels|training|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"the README names {path}, which is not there"
