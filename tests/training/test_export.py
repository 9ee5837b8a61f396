import argparse
import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.exit_setup import EXITS, make_cache, make_exits

from hispec.errors import CheckpointError, HispecError, UsageError
from hispec.model.checkpoint import open_checkpoint
from hispec.model.exits import Exits
from hispec_training import export
from hispec_training.export import TrainedExits, load_into

TABLE = {
    "texts": "some texts",
    "top1": 0.5,
    "positions": 1234,
    "divisions": 8,
    "by_category": {"qa": 0.4, "chat": 0.6},
    "by_offset": [0.6, 0.5],
}


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return open_checkpoint(tiny_llama)


@pytest.fixture
def saved(checkpoint, tmp_path):
    exits = make_exits(checkpoint, make_cache(tmp_path / "cache", checkpoint))
    with torch.no_grad():
        for p in exits.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        for head in exits.heads.values():
            head.set_input_scale(torch.rand(head.proj.in_features) + 0.5)
    table = dict.fromkeys(EXITS, TABLE)
    TrainedExits.from_training(exits, checkpoint, table, training={"steps": 7}).save_pretrained(
        tmp_path / "exits"
    )
    return exits, tmp_path / "exits"


def test_export_reloads_bit_equal(saved, checkpoint, tmp_path):
    exits, folder = saved
    loaded = TrainedExits.from_pretrained(folder, checkpoint)
    for e in EXITS:
        want = exits.heads[str(e)].state_dict()
        want["proj.weight"] = want["proj.weight"] / want["input_scale"]
        want["input_scale"] = torch.ones_like(want["input_scale"])
        got = loaded.heads[str(e)].state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[n], want[n].bfloat16().float()) for n in want)
        assert torch.equal(loaded.vocab_ids[e], exits.vocab_ids(e))
    loaded.save_pretrained(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", "exit_1.safetensors", "exit_2.safetensors"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_lora_head_is_a_tiny_file_that_reloads(checkpoint, tmp_path):
    exits = make_exits(
        checkpoint, make_cache(tmp_path / "cache", checkpoint), kind="lora", rank=2, start_layer=-1
    )
    with torch.no_grad():
        for p in exits.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    TrainedExits.from_training(exits, checkpoint).save_pretrained(tmp_path / "exits")
    tensors = load_file(tmp_path / "exits" / "exit_1.safetensors")
    assert tensors["block.mlp.down_proj.lora_A.weight"].shape == (2, 96)
    assert not any("base_layer" in name for name in tensors)
    assert "block.input_layernorm.weight" not in tensors
    entry = json.loads((tmp_path / "exits" / "config.json").read_text())["exits"][0]
    assert (entry["kind"], entry["layer"], entry["rank"]) == ("lora", 5, 2)
    loaded = TrainedExits.from_pretrained(tmp_path / "exits", checkpoint)
    want = exits.heads["1"].state_dict()
    got = loaded.heads["1"].state_dict()
    assert got.keys() == want.keys()
    frozen = {n for n, p in exits.heads["1"].named_parameters() if not p.requires_grad}
    assert frozen
    for name in want:
        exact = want[name] if name in frozen else want[name].bfloat16().float()
        assert torch.equal(got[name], exact), name
    load_into(make_exits(checkpoint, make_cache(tmp_path / "cache", checkpoint), kind="lora",
                         rank=2, start_layer=-1), loaded)  # fmt: skip
    del tensors["block.mlp_scale"]
    save_file(tensors, tmp_path / "exits" / "exit_1.safetensors")
    with pytest.raises(CheckpointError, match="mlp_scale"):
        TrainedExits.from_pretrained(tmp_path / "exits", checkpoint)


def test_files_hold_the_documented_tensors(saved):
    _, folder = saved
    tensors = load_file(folder / "exit_1.safetensors")
    layer = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    layer += ["input_layernorm", "post_attention_layernorm", "context_layernorm"]
    layer += ["context_k_proj", "context_v_proj"]
    names = {f"block.{name}.weight" for name in layer}
    names |= {"proj.weight", "proj.bias", "feature_layernorm.weight", "feature_proj.weight"}
    assert set(tensors) == names | {"norm.weight", "vocab_ids"}
    assert tensors["vocab_ids"].dtype == torch.int32
    assert all(x.dtype == torch.bfloat16 for n, x in tensors.items() if n != "vocab_ids")


def test_another_base_is_refused_unless_forced(saved, make_llama):
    _, folder = saved
    other_folder = make_llama("other")
    path = other_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, path, {"format": "pt"})
    other = open_checkpoint(other_folder)
    with pytest.raises(UsageError, match="trained on"):
        TrainedExits.from_pretrained(folder, other)
    assert set(TrainedExits.from_pretrained(folder, other, force=True).heads) == {"1", "2"}


def test_damage_and_absence_are_one_sentence(saved, checkpoint, tmp_path):
    _, folder = saved
    config, given = folder / "config.json", (folder / "config.json").read_text()
    for key, value in (("exits", 5), ("exits", [5]), ("base", 5), ("hierarchies", [])):
        config.write_text(json.dumps({**json.loads(given), key: value}))
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            Exits.open(folder)
    config.write_text(given)
    with pytest.raises(UsageError, match="no exits in"):
        TrainedExits.from_pretrained(tmp_path, checkpoint)
    file = folder / "exit_2.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"exit_2\.safetensors is damaged"):
        TrainedExits.from_pretrained(folder, checkpoint)


def test_card_shows_base_tables_and_run(saved):
    _, folder = saved
    card = (folder / "README.md").read_text()
    record = json.loads((folder / "config.json").read_text())
    assert card.startswith("---\nbase_model: ")
    assert record["base"]["fingerprint"] in card
    assert "| all positions | 0.500 | 0.500 |" in card and "| qa | 0.400 | 0.400 |" in card
    assert "1,234 positions, each under 8 divisions" in card and "- steps: 7" in card


def test_warm_start_takes_the_weights(saved, checkpoint, tmp_path):
    exits, folder = saved
    cache = make_cache(tmp_path / "cache", checkpoint)
    fresh = make_exits(checkpoint, cache)
    load_into(fresh, TrainedExits.from_pretrained(folder, checkpoint))
    for name, p in fresh.named_parameters():
        if not name.endswith("proj.weight"):
            assert torch.equal(p, exits.get_parameter(name).bfloat16().float())
    assert not torch.equal(fresh.heads["1"].proj.weight, torch.eye(64))
    other = make_exits(checkpoint, cache, context="none", feature=False)
    with pytest.raises(UsageError, match="other parts"):
        load_into(other, TrainedExits.from_pretrained(folder, checkpoint))


def test_push_uploads_the_folder(saved, checkpoint, monkeypatch):
    _, folder = saved
    seen = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            from pathlib import Path

            seen.update({p.name: p.stat().st_size for p in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    exits = TrainedExits.from_pretrained(folder, checkpoint)
    assert exits.push_to_hub("me/exits") == "https://hub/me/exits"
    assert set(seen) == {path.name for path in folder.iterdir()}


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"feature": False},
        {"context": "none", "feature": False, "vocab_size": 0},
        {"kind": "affine", "context": "none", "feature": False},
        {"kind": "lora", "rank": 3, "start_layer": 4},
        {"kind": "lora", "rank": 3, "context": "none", "feature": False},
    ],
    ids=["deep", "deep without feature", "own context", "affine", "lora", "lora, own context"],
)
def test_the_engine_drafts_with_what_was_trained(checkpoint, tmp_path, spec):
    """Two rounds with a rejection between: the engine's logits are the trained head's."""
    from hispec.model.exits import Exits as Saved
    from hispec.model.llama import Llama
    from hispec.model.nodes import Nodes

    exits = make_exits(checkpoint, make_cache(tmp_path / "cache", checkpoint), **spec)
    for p in exits.parameters():
        if p.requires_grad:  # the rest is the model's
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
            p.copy_(p.bfloat16())
    if "proj" in exits.heads["2"]._modules:
        exits.heads["2"].set_input_scale(2.0 ** torch.arange(64).remainder(3))  # exact in bf16
    TrainedExits.from_training(exits, checkpoint).save_pretrained(tmp_path / "exits")
    model = Llama.load(checkpoint, torch.float32, torch.device("cpu"))
    final, e = checkpoint.config.num_layers, 2
    head = Saved.open(tmp_path / "exits").head(e, model, checkpoint)
    cache = model.new_cache([*EXITS, final])
    tokens = [int(t) for t in torch.randint(0, 200, (40,))]
    model.prefill(cache, tokens[:13])
    for root, drafted in ((13, 3), (15, 2), (20, 4)):
        model.advance(cache, tokens, root, final)
        model.advance(cache, tokens, root + drafted, e)
        got = head.logits(cache, root, Nodes.line(root, drafted))
        positions = torch.arange(root, root + drafted)[None]
        states = cache.states[e][: root + drafted].float()[None].clone()
        deep = cache.states[final][: root + drafted].float()[None].clone()
        x = exits.heads[str(e)](states, deep, positions, torch.full_like(positions, root))
        want = torch.nn.functional.linear(x[0], getattr(exits, f"rows_{e}"))
        torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-3)
        if head.vocab_ids is not None:
            assert torch.equal(head.vocab_ids, exits.vocab_ids(e))
        cache.truncate(root)
        head.truncate(root)


def test_measured_acceptance_is_written_into_the_folder(
    saved, checkpoint, tmp_path, capsys, monkeypatch
):
    from hispec_training import measure

    exits, folder = saved
    rows = [{"prompt_ids": [1, 2], "response_ids": list(range(3, 30)), "category": "qa"}] * 3
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parser = argparse.ArgumentParser()
    measure.add_arguments(parser)
    given = ["--model", checkpoint.name, "--exits", str(folder), "--write"]
    args = parser.parse_args([*given, "--data", str(tmp_path / "data.jsonl")])
    weights = (folder / "exit_2.safetensors").read_bytes()
    assert measure.main(args) == 0
    tables = json.loads(capsys.readouterr().out)
    record = json.loads((folder / "config.json").read_text())
    table = record["exits"][1]["acceptance"]
    assert table["texts"] == "data.jsonl" and (table["positions"], table["divisions"]) == (
        3 * 27,
        8,
    )
    assert table["top1"] == tables["2"]["top1"] and "by_offset" in table
    assert tables["2"]["predicted_speedup"] > 0 and 1 <= tables["2"]["best_window"] <= 8
    assert (folder / "exit_2.safetensors").read_bytes() == weights
    revived = measure.revive(TrainedExits.from_pretrained(folder, checkpoint), checkpoint)
    assert torch.equal(revived.vocab_ids(2), exits.vocab_ids(2))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "replacing", full)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(HispecError, match=f"cannot write {folder} .No space left") as caught:
        measure.main(args)
    assert "\n" not in str(caught.value) and "tables are printed" in str(caught.value)
    printed = json.loads(capsys.readouterr().out)
    assert printed["2"]["top1"] == table["top1"], "nothing that was measured is lost"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
