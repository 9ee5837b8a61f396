"""One prompt, answered twice with the command line: hierarchically, then plainly.

Prints both speeds and whether the tokens are the same; they must be, or the exit code is 1.
"""

from __future__ import annotations

import codecs
import json
import os
import subprocess
import sys

PROMPT = (
    "Rewrite this as a list of steps and explain each one: boil the water, add the pasta, stir it, "
    "wait for nine minutes, drain the water and serve the pasta with tomato sauce."
)


def answer(prompt: str, hierarchy: str, *, show: bool) -> dict:
    """The JSON document of one ``hispec generate``; its text goes to stdout as it arrives."""
    command = [sys.executable, "-m", "hispec.cli", "generate", "--model", "smollm2-135m"]
    command += ["--hierarchy", hierarchy, "--prompt", prompt, "--max-new-tokens", "160"]
    command += ["--json"] + (["--stats"] if show else [])
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if show else subprocess.PIPE,
    )
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    line = ""  # the unfinished line; the last one is the JSON document and is not shown
    while chunk := os.read(process.stdout.fileno(), 65536):
        for piece in decode(chunk).splitlines(keepends=True):
            held = line.startswith("{")
            line += piece
            if show and not held and not line.startswith("{"):
                print(piece, end="", flush=True)
            if line.endswith("\n"):
                last, line = line, ""
    _, errors = process.communicate()
    if process.returncode:
        sys.exit((errors or b"").decode().strip() or f"hispec generate --hierarchy {hierarchy} failed")
    return json.loads(line or last)


def main() -> None:
    prompt = " ".join(sys.argv[1:]) or PROMPT
    print(f"> {prompt}\n")
    fast = answer(prompt, "hispec", show=True)
    print("\nThe same with plain decoding ...", file=sys.stderr)
    plain = answer(prompt, "ar", show=False)
    same = fast["token_ids"] == plain["token_ids"]
    print(
        f"\nhispec {fast['tok_per_s']:.1f} tok/s, plain decoding {plain['tok_per_s']:.1f} tok/s "
        f"({fast['tok_per_s'] / plain['tok_per_s']:.2f}x), {len(plain['token_ids'])} tokens, "
        f"{'the same' if same else 'NOT the same'}; {fast['dtype']} on {fast['device']}."
    )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
