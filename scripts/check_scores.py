"""Do hierarchies score alike? lm-evaluation-harness on maths questions that have references.

    pip install lm-eval
    python scripts/check_scores.py --model smollm2-135m --prompts question.jsonl --limit 80

A local task, no hub: each question is asked in the model's chat template, and its answer's last
number must be the reference's last number. Exit code 1 if two hierarchies' scores or tokens differ.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from hispec.bench.prompts import load_prompts

TASK = """
task: maths
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: {tokens}, do_sample: false}}
filter_list:
  - name: last-number
    filter:
      - {{function: regex, regex_pattern: "(-?[0-9][0-9.,]*)", group_select: -1}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, ignore_punctuation: true}}
"""


def write_task(folder: Path, prompts: str, category: str, limit: int, tokens: int) -> int:
    """Writes the task and its data; returns how many questions it has."""
    rows = []
    for prompt in load_prompts(prompts).prompts:
        numbers = re.findall(r"-?[0-9][0-9.,]*", " ".join(prompt.references))
        if prompt.category == category and numbers:
            rows.append({"question": prompt.turns[0], "answer": numbers[-1]})
    data = folder / "maths.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:limit]))
    (folder / "maths.yaml").write_text(TASK.format(data=data, tokens=tokens))
    return len(rows[:limit])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", required=True, help="JSONL with references")
    parser.add_argument("--category", default="math_reasoning")
    parser.add_argument("--hierarchies", nargs="+", default=["ar", "layerskip", "hispec", "auto"])
    parser.add_argument("--limit", type=int, default=80)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, help="JSON of the scores")
    args = parser.parse_args()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from hispec.bench.lm_eval import HispecLM
    from hispec.bench.provenance import collect

    scores, answers = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_task(folder, args.prompts, args.category, args.limit, args.max_new_tokens)
        manager = TaskManager(include_path=name, include_defaults=False)
        for hierarchy in args.hierarchies:
            model = HispecLM(model=args.model, hierarchy=hierarchy)
            found = simple_evaluate(
                model=model,
                tasks=["maths"],
                task_manager=manager,
                apply_chat_template=True,
                bootstrap_iters=0,
            )
            scores[hierarchy] = found["results"]["maths"]["exact_match,last-number"]
            answers[hierarchy] = [result.token_ids for result in model.results]
            spent_s = sum(result.decode_s for result in model.results)
            print(f"{hierarchy:<12} {scores[hierarchy]:.4f} of {count} right, {spent_s:.1f} s")
    if args.out:
        record = {"machine": collect(model.lm), "questions": count, "exact_match": scores}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    same = len({json.dumps(ids) for ids in answers.values()}) == 1 == len(set(scores.values()))
    print("same tokens, same scores" if same else "THEY DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
