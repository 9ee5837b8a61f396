"""The saved adapter, merged into the model: other libraries read it, and its quality is counted."""

import json

import pytest
import torch
import torch.nn.functional as F
from training.exit_setup import make_cache
from training.lora_setup import EXITS, SHAPE, make_trainer

from hispec.errors import UsageError
from hispec.model.adapter import Adapter, merge
from hispec.model.checkpoint import open_checkpoint
from hispec_training.adapter import LoraShape, Student, add_lora, save_adapter, start_from
from hispec_training.quality import agreement, perplexity
from hispec_training.trunk import Trunk


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return open_checkpoint(tiny_llama)


@pytest.fixture(scope="module")
def cache(checkpoint, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), checkpoint)


@pytest.fixture(scope="module")
def adapted(checkpoint, cache, tmp_path_factory):
    """A trained adapter and its merged checkpoint in fp32."""
    folder = tmp_path_factory.mktemp("adapted")
    trainer = make_trainer(checkpoint, cache, folder / "work", steps=30, lr=1e-2)
    trainer.run()
    save_adapter(trainer.student.model, folder / "adapter")
    (folder / "merged").mkdir()
    merge(Adapter.open(folder / "adapter"), checkpoint, folder / "merged")
    return trainer, folder


def test_adapter_loads_through_peft_and_merges_to_the_same_model(checkpoint, adapted):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer, folder = adapted
    base = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == checkpoint.name
    ids = torch.arange(30)[None]
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    with torch.no_grad():
        outs = [m(ids).logits for m in (trainer.student.model, loaded, merged)]
        plain = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)(ids)
    torch.testing.assert_close(outs[1], outs[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[0], outs[2], rtol=0.05, atol=0.05)  # saved in bf16
    assert (outs[2] - plain.logits).abs().max() > 0.1


@pytest.mark.parametrize("shape", [SHAPE, LoraShape(rank=12, deep_rank=5, alpha=4.0)])
def test_a_run_starts_where_an_adapter_ended(checkpoint, adapted, shape):
    trainer, folder = adapted
    model = add_lora(checkpoint, EXITS, shape, torch.float32, seed=1)
    start_from(model, Adapter.open(folder / "adapter"), checkpoint)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        got, want = Student(model)(ids, (1, 3, 6)), trainer.student(ids, (1, 3, 6))
        plain = Student(add_lora(checkpoint, EXITS, shape, torch.float32, seed=1))(ids, (6,))
    for e in want:
        torch.testing.assert_close(got[e], want[e], rtol=0.02, atol=0.02)  # saved in bf16
    assert (got[6] - plain[6]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("shape", "room"), [(LoraShape(4, 2), 4), (LoraShape(8, 1), 1), (LoraShape(8, 0), 0)]
)
def test_an_adapter_of_higher_rank_is_refused(checkpoint, adapted, shape, room):
    _, folder = adapted
    model = add_lora(checkpoint, EXITS, shape, torch.float32, seed=1)
    with pytest.raises(UsageError, match=f"has rank . at .*; this run has {room}"):
        start_from(model, Adapter.open(folder / "adapter"), checkpoint)


def test_merged_checkpoint_runs_under_assistant_early_exit(adapted):
    from transformers import AutoModelForCausalLM

    _, folder = adapted
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    ids = torch.arange(5, 15)[None]
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, **settings)
    early = model.generate(ids, assistant_early_exit=3, **settings)
    assert torch.equal(plain, early)


def test_quality_counts_what_a_plain_loop_counts(checkpoint, cache, adapted):
    from transformers import AutoModelForCausalLM

    _, folder = adapted
    found = agreement(Trunk(open_checkpoint(folder / "merged"), torch.float32), cache, EXITS)
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    same = own = total = 0
    with torch.no_grad():
        for i in range(len(cache)):
            text = cache[i]
            out = model(text.ids.long()[None], output_hidden_states=True)
            place = slice(text.first, text.first + len(text.pick))
            picks = out.logits[0, place].argmax(-1)
            h = model.model.norm(out.hidden_states[3][0, place])
            own += int(((h @ model.lm_head.weight.T).argmax(-1) == picks).sum())
            same += int((picks == text.pick).sum())
            total += len(picks)
    table = found.table()
    assert table["positions"] == total
    assert table["greedy_agreement"]["all"] == pytest.approx(same / total, abs=5e-3)
    assert table["exits"]["3"]["all"] == pytest.approx(own / total, abs=5e-3)
    original = agreement(Trunk(checkpoint, torch.float32), cache, EXITS).table()
    assert original["greedy_agreement"]["all"] == 1.0
    assert original["exits"] == original["exits_vs_original"]


def test_perplexity_is_exp_of_the_mean_loss(checkpoint):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    ids = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0))
    windows = ids[:96].view(3, 32)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
        want = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp().item()
    got = perplexity(Trunk(checkpoint, torch.float32), ids.tolist(), window=32)
    assert got == pytest.approx(want, rel=1e-4)
