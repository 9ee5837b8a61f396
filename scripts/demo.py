"""One prompt, answered twice by one loaded model: with the hispec hierarchy, then plainly.

The first answer is streamed with its statistics. The second is only timed and compared: the tokens
must be the same, or the exit code is 1. Usage: demo.py [PROMPT]
"""

from __future__ import annotations

import sys

import hispec
from hispec.commands.options import print_stats

MODEL = "smollm2-135m"
MAX_NEW_TOKENS = 160
PROMPT = "Write a Python function that returns the n-th Fibonacci number, and explain how it works."


def main() -> int:
    prompt = " ".join(sys.argv[1:]) or PROMPT
    print(f"Loading {MODEL} ...", file=sys.stderr)
    lm = hispec.load(MODEL)
    for hierarchy in ("hispec", "ar"):  # every shape once, so that neither answer pays for it
        hispec.generate(lm, prompt, hierarchy=hierarchy, max_new_tokens=8)

    print(f"\n$ hispec generate --model {MODEL} --hierarchy hispec --stats --prompt {prompt!r}\n")
    stream = hispec.stream(lm, prompt, hierarchy="hispec", max_new_tokens=MAX_NEW_TOKENS)
    for piece in stream:
        print(piece, end="", flush=True)
    print("\n", flush=True)
    print_stats(stream.result)
    fast = stream.result
    plain = hispec.generate(lm, prompt, hierarchy="ar", max_new_tokens=MAX_NEW_TOKENS)

    same = fast.token_ids == plain.token_ids
    print(
        f"\nhispec {fast.tok_per_s:.1f} tok/s, plain decoding {plain.tok_per_s:.1f} tok/s "
        f"({fast.tok_per_s / plain.tok_per_s:.2f}x): {plain.num_tokens} tokens, "
        f"{'the same' if same else 'NOT the same'} ({fast.dtype}, {fast.device})."
    )
    return 0 if same else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except hispec.HispecError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
