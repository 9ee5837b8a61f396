"""Is sampled text the same whatever the hierarchy, and how often do exits guess it?

    python scripts/check_sampling.py --prompts question.jsonl --triples 208 --hf 60

For each dtype:

1. *Identity.* Each (prompt, seed, setting) triple is continued by plain decoding and by every
   hierarchy; the ids must be the same. Settings go through temperatures 0.3, 0.7, 1.0 and 1.5,
   filters and penalties.
2. *Coupling* (``--agreement``, exits needed). At temperature 1, at every position of plain texts
   of the target: how often an exit's pick under the shared noise is the target's, over
   ``--noises`` seeds, beside the mean bounds (1 - TV) / (1 + TV) and 1 - TV of the two
   distributions (TV: half the sum of absolute differences).
3. *Speed* (``--speed``). Decoding time of each hierarchy against plain decoding at temperatures 0,
   0.7 and 1.0, same tokens, interleaved.
4. *transformers* (``--hf N``). In fp32, greedy ``custom_generate`` against ``generate`` on the same
   module; every third case has a repetition penalty, a stop string, or a streamer. Where they
   part, the top-2 gap of transformers' scores there is listed; below 1e-3 it is a rounding tie.

``--out`` gets one JSON object a line: the machine first, then a row a comparison. Exit code 1 if
any token differs, ties with transformers apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import hispec
from hispec.bench.prompts import load_prompts
from hispec.bench.provenance import collect
from hispec.generation import LM
from hispec.model.measured import cpu_name
from hispec.model.nodes import Nodes
from hispec.sampling import Sampling, stream_seed
from hispec_kernels import gumbel

ROOT = Path(__file__).resolve().parent.parent
TIE = 1e-3

SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.3},
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 1.5},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.1},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 1.5, "top_k": 20, "min_p": 0.05},
    {"temperature": 0.7, "typical_p": 0.9},
    {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.3, "no_repeat_ngram_size": 3},
    {"repetition_penalty": 1.3},
    {"temperature": 1.5, "top_p": 0.8, "repetition_penalty": 1.2},
)
Write = Callable[[dict[str, Any]], None]


def identity(lm: LM, texts: Sequence[list[int]], args: argparse.Namespace, write: Write) -> int:
    """Returns how many triples differ from plain decoding under some hierarchy."""
    wrong = 0
    for number in range(args.triples):
        setting = SETTINGS[number % len(SETTINGS)]
        ids = texts[number % len(texts)]
        sampling = Sampling(**setting, seed=stream_seed(args.seed, number))
        options = {"max_new_tokens": args.max_new_tokens, "sampling": sampling}
        wanted = lm.generate(ids, hierarchy="ar", **options).token_ids
        row: dict[str, Any] = {"kind": "triple", "number": number, "setting": setting}
        for name in args.hierarchies:
            found = lm.generate(ids, hierarchy=name, **options)
            equal = found.token_ids == wanted
            row[name] = {"equal": equal, "block_efficiency": found.block_efficiency}
        differs = [name for name in args.hierarchies if not row[name]["equal"]]
        wrong += bool(differs)
        write({**row, "tokens": len(wanted)})
        show(f"{number + 1} of {args.triples} triples", differs)
    print(f"  {args.triples - wrong} of {args.triples} triples equal plain decoding's text")
    return wrong


def agreement(lm: LM, texts: Sequence[list[int]], args: argparse.Namespace, write: Write) -> None:
    """Compares the picks of exits and target under shared noise, at all positions of some texts.

    The exits see every position as a round's root: states of the text before are the target's.
    """
    assert lm.exits is not None
    exits, layers = list(lm.exits.exit_layers), lm.model.config.num_layers
    sums = {e: torch.zeros(4, dtype=torch.float64) for e in exits}
    for text in texts:
        plain = lm.generate(text, hierarchy="ar", temperature=1.0, seed=args.seed).token_ids
        ids = [*text, *plain][: len(text) + 64]
        with torch.inference_mode():
            cache = lm.model.new_cache([*exits, layers])
            lm.model.prefill(cache, ids)
            heads = {e: lm.exits.head(e, lm.model, lm.checkpoint) for e in exits}
            for root in range(len(text), len(ids) - 1):
                target = lm.model.logits(cache.states[layers][root : root + 1]).float()[0]
                p = target.softmax(0)
                for e, head in heads.items():
                    kept = dict(cache.computed)
                    cache.truncate(root + 1)
                    row = head.logits(cache, root, Nodes(root)).float()[0]
                    cache.computed.update(kept)
                    head.truncate(root)
                    columns = head.vocab_ids
                    columns = torch.arange(len(p)) if columns is None else columns
                    q = torch.zeros_like(p)
                    q[columns] = row.softmax(0)
                    distance = float((p - q).abs().sum()) / 2
                    same = 0
                    for seed in range(args.noises):
                        noise = gumbel(seed, torch.tensor([root + 1]), torch.arange(len(p)))
                        mine = columns[(row + noise[columns]).argmax()]
                        same += int(mine == (target + noise).argmax())
                    low = (1 - distance) / (1 + distance)
                    sums[e] += torch.tensor([1, same / args.noises, low, 1 - distance])
    for e, (count, same, low, high) in sums.items():
        found = {"agreement": same / count, "lower": low / count, "upper": high / count}
        found = {name: round(float(value), 4) for name, value in found.items()}
        write({"kind": "coupling", "exit": e, "positions": int(count), **found})
        print(
            f"  exit {e}: picks agree {found['agreement']:.3f} at {int(count)} positions, bounds "
            f"{found['lower']:.3f} and {found['upper']:.3f}"
        )


def speed(lm: LM, texts: Sequence[list[int]], args: argparse.Namespace, write: Write) -> None:
    """Measures decoding time against plain decoding, hierarchies interleaved for each prompt."""
    for temperature in (0.0, 0.7, 1.0):
        times = dict.fromkeys(("ar", *args.hierarchies), 0.0)
        tokens = 0
        for number, ids in enumerate(texts):
            sampling = Sampling(temperature, stream_seed(args.seed, number))
            # Fresh databases: the same prompts come again at the next temperature.
            options = {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "learn": False}
            for name in times:
                found = lm.generate(ids, hierarchy=name, **options)
                times[name] += found.decode_s
            tokens += found.num_tokens - 1
        ratios = {name: round(times["ar"] / t, 3) for name, t in times.items() if name != "ar"}
        row = {"temperature": temperature, "ar_tok_per_s": tokens / times["ar"], **ratios}
        write({"kind": "speed", "prompts": len(texts), **row})
        print(f"  T={temperature}: ar {tokens / times['ar']:.1f} tok/s, speed-ups {ratios}")


def transformers_parity(
    lm: LM, texts: Sequence[list[int]], args: argparse.Namespace, write: Write
) -> int:
    """Returns how many greedy texts differ from transformers' by more than a rounding tie."""
    from transformers import AutoModelForCausalLM, StopStringCriteria, TextIteratorStreamer

    tokenizer: Any = lm.tokenizer
    model = AutoModelForCausalLM.from_pretrained(lm.checkpoint.path, dtype=torch.float32).eval()
    wrong = ties = 0
    for number, ids in enumerate(texts[: args.hf]):
        inputs = torch.tensor([ids])
        options: dict[str, Any] = {
            "max_new_tokens": args.max_new_tokens,
            "do_sample": False,
            "attention_mask": torch.ones_like(inputs),
            "pad_token_id": tokenizer.pad_token_id or 0,
        }
        case = ("plain", "repetition penalty", "stop string", "streamer")[number % 4]
        streams = [TextIteratorStreamer(tokenizer, skip_prompt=True) for _ in range(2)]
        if case == "repetition penalty":
            options["repetition_penalty"] = 1.2
        if case == "stop string":
            options["stopping_criteria"] = [StopStringCriteria(tokenizer, [".", "\n"])]
        more = [{"streamer": one} if case == "streamer" else {} for one in streams]
        kept = {"return_dict_in_generate": True, "output_scores": True}
        wanted = model.generate(inputs, **options, **kept, **more[0])
        call = hispec.generate_with(hierarchy=args.hierarchies[number % len(args.hierarchies)])
        found = model.generate(inputs, custom_generate=call, **options, **more[1])[0].tolist()
        theirs = wanted.sequences[0].tolist()
        row = {"kind": "transformers", "number": number, "case": case, "equal": found == theirs}
        if case == "streamer" and found == theirs:
            row["streamed"] = "".join(streams[0]) == "".join(streams[1])
            wrong += not row["streamed"]
        if found != theirs:
            pairs = zip(found, theirs, strict=False)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), len(found)) - len(ids)
            best = wanted.scores[place][0].topk(2).values
            row |= {"place": place, "top_2_gap": float(best[0] - best[1])}
            tie = row["top_2_gap"] < TIE
            ties, wrong = ties + tie, wrong + (not tie)
        write(row)
        show(f"{number + 1} of {args.hf} texts of transformers", [] if found == theirs else [case])
    print(f"  transformers: {args.hf - wrong - ties} of {args.hf} equal, {ties} part at a tie")
    return wrong


def show(text: str, differs: Sequence[str]) -> None:
    if differs:
        print(f"  differs: {text}: {', '.join(differs)}")
    if sys.stderr.isatty():
        print(f"\r{text}", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with args.out.open("w") as out:

        def write(row: dict[str, Any]) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()

        for dtype in args.dtypes:
            lm = hispec.load(args.model, exits=args.exits, dtype=dtype)
            prompts = load_prompts(args.prompts, args.limit).prompts
            texts = [list(prompt.ids) or lm.encode(prompt.chat(0, ())) for prompt in prompts]
            room = lm.model.config.max_positions - args.max_new_tokens
            texts = [text for text in texts if len(text) < room]
            shown = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
            write({"kind": "provenance", **collect(lm), "settings": shown})
            print(f"{dtype} on {cpu_name()}, {torch.get_num_threads()} threads")
            wrong += identity(lm, texts, args, write)
            if args.agreement and lm.exits is not None:
                agreement(lm, texts[: args.agreement], args, write)
            if args.speed:
                speed(lm, texts[: args.speed], args, write)
            if args.hf and dtype == "fp32":
                wrong += transformers_parity(lm, texts, args, write)
    print(f"rows are in {args.out}")
    return int(wrong > 0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--prompts", default="builtin", help="JSONL file or preset (builtin)")
    parser.add_argument("--limit", type=int, default=60, help="prompts, evenly over categories")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--exits", help="folder of trained exits")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtypes", type=names, default=["bf16", "fp32"], help="bf16,fp32")
    parser.add_argument("--hierarchies", type=names, default=["layerskip", "hispec", "hd", "auto"])
    parser.add_argument("--triples", type=int, default=208, help="(prompt, seed, setting)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--agreement", type=int, default=0, help="texts to compare exits' picks on")
    parser.add_argument("--noises", type=int, default=16, help="seeds at each position of these")
    parser.add_argument("--speed", type=int, default=0, help="prompts to time")
    parser.add_argument("--hf", type=int, default=0, help="texts to compare with transformers")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "results" / "sampling.jsonl")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except hispec.HispecError as error:
        print(f"check_sampling: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
