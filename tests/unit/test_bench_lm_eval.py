"""lm-eval's view of a hierarchy: the same answers, so the same scores, whatever the hierarchy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from hispec.bench.lm_eval import HispecLM
from hispec.bench.prompts import BUILTIN
from hispec.errors import HispecError

TASK = """
task: own_maths
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{reference}}}}"
generation_kwargs: {{until: ["####"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - metric: bleu
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [json.loads(line) for line in BUILTIN.read_text().splitlines()]
    kept = [row for row in rows if row["category"] == "math_reasoning"]
    data = tmp_path / "maths.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in kept))
    (tmp_path / "own_maths.yaml").write_text(TASK.format(data=data))
    return tmp_path


def test_every_hierarchy_scores_the_same(
    tiny_llama: Path, task: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets.config
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    scores, answers = [], []
    for hierarchy in ("ar", "layerskip", "hispec-paper"):
        model = HispecLM(model=str(tiny_llama), hierarchy=hierarchy, dtype="fp32", device="cpu")
        found = simple_evaluate(
            model=model,
            tasks=["own_maths"],
            task_manager=TaskManager(include_path=str(task), include_defaults=False),
            bootstrap_iters=0,
        )
        scores.append(found["results"]["own_maths"])
        answers.append([result.token_ids for result in model.results])
    assert len(answers[0]) == 4 and all(answers[0])
    assert answers[0] == answers[1] == answers[2]
    assert scores[0] == scores[1] == scores[2]


def test_scoring_given_text_is_refused(tiny_llama: Path, cache_home: Path) -> None:
    model = HispecLM(model=str(tiny_llama), dtype="fp32", device="cpu")
    with pytest.raises(HispecError, match="generation tasks only"):
        model.loglikelihood([])
