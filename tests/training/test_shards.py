import gzip
import json

import pytest
import torch
from safetensors import SafetensorError
from training.exit_setup import EXITS, make_cache, make_examples

from hispec.errors import HispecError, UsageError
from hispec.model.checkpoint import open_checkpoint
from hispec_training import files, shards
from hispec_training.batches import (
    collate,
    draw_roots,
    epoch_batches,
    fixed_roots,
    training_batches,
)
from hispec_training.shard_cache import ShardCache
from hispec_training.shards import build_shards, cut, read_examples, split_examples
from hispec_training.trunk import Trunk


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return open_checkpoint(tiny_llama)


def test_cache_holds_what_the_trunk_says(checkpoint, tmp_path):
    cache = make_cache(tmp_path, checkpoint)
    trunk = Trunk(checkpoint, torch.float32)
    final = checkpoint.config.num_layers
    assert len(cache.paths) > 2
    for i, example in enumerate(make_examples(24)):
        text = cache[i]
        assert tuple(text.ids.tolist()) == example.ids
        assert text.category == example.category and text.first == example.prompt_length - 1
        ids = torch.tensor([example.ids])
        states = trunk.states(ids, [ids.shape[1]], [*EXITS, final])
        for e in (*EXITS, final):
            torch.testing.assert_close(text.states[e].float(), states[e][0], rtol=0.01, atol=0.01)
        logits = trunk.logits(states[final][0])[text.first : -1]
        assert len(text.pick) == len(example.ids) - example.prompt_length == len(logits)
        torch.testing.assert_close(text.top_logits, logits.topk(4).values, rtol=1e-3, atol=1e-3)
        near = logits.gather(1, text.pick.long()[:, None])[:, 0]
        torch.testing.assert_close(near, logits.amax(-1), rtol=1e-3, atol=1e-3)


def test_ties_go_to_the_lowest_id(checkpoint):
    class Flat:
        def logits(self, states):
            logits = torch.zeros(len(states), 30)
            logits[:, [7, 11, 5]] = 1.0
            return logits

    answers = shards._answers(Flat(), torch.zeros(3, 8), top_k=4)
    assert answers["pick"].tolist() == [5, 5, 5]


def test_nothing_runs_twice_and_damage_is_redone(checkpoint, tmp_path):
    cache = make_cache(tmp_path, checkpoint)
    before = {path: path.read_bytes() for path in cache.paths}
    runs = []

    def again(count=24):
        def make_trunk():
            runs.append(1)
            return Trunk(checkpoint, torch.float32)

        return build_shards(
            tmp_path,
            make_examples(count),
            make_trunk,
            fingerprint=checkpoint.fingerprint,
            layers=[*EXITS, checkpoint.config.num_layers],
            top_k=4,
            shard_tokens=150,
        )

    again()
    assert not runs
    damaged, torn, unfinished = cache.paths[:3]
    data = bytearray(before[damaged])
    data[-5] ^= 1
    damaged.write_bytes(data)
    torn.write_bytes(before[torn][:-10])
    unfinished.with_suffix(".json").unlink()
    again()
    assert runs == [1]
    assert {path: path.read_bytes() for path in cache.paths} == before


def test_other_data_is_another_shard(checkpoint, tmp_path):
    make_cache(tmp_path, checkpoint, seed=0)
    other = make_cache(tmp_path, checkpoint, seed=1)
    assert tuple(other[0].ids.tolist()) == make_examples(24, seed=1)[0].ids


def test_appending_keeps_earlier_groups():
    examples = make_examples(30)
    short, long = split_examples(examples[:20], 100), split_examples(examples, 100)
    assert long[: len(short) - 1] == short[:-1]
    assert [e for group in long for e in group] == examples


def test_cache_is_bounded(checkpoint, tmp_path):
    whole = make_cache(tmp_path / "whole", checkpoint)
    sizes = [json.loads(p.with_suffix(".json").read_text())["bytes"] for p in whole.paths]
    bounded = build_shards(
        tmp_path / "bounded",
        make_examples(24),
        lambda: Trunk(checkpoint, torch.float32),
        fingerprint=checkpoint.fingerprint,
        layers=[*EXITS, checkpoint.config.num_layers],
        top_k=4,
        shard_tokens=150,
        max_bytes=2 * max(sizes[:2]) + 1,
    )
    assert len(bounded.paths) == 2
    assert len(list((tmp_path / "bounded").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_full_disk_says_so(checkpoint, tmp_path, monkeypatch, error):
    def no_room(*_):
        raise error

    monkeypatch.setattr(files, "save_file", no_room)
    with pytest.raises(HispecError, match=r"No space left.*: 0 of \d+ shards were written"):
        make_cache(tmp_path, checkpoint)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_rows_are_read_cut_and_counted(tmp_path):
    rows = [
        {"prompt_ids": [1, 2], "response_ids": [3, 4, 5], "category": "a"},
        {"prompt_ids": [1, 2], "response_ids": []},
        {"prompt_ids": [1] * 9, "response_ids": [3]},
        {"prompt_ids": [1], "response_ids": [3] * 9},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt_ids": [1, 2')
    examples, counts = read_examples([path], max_length=6)
    assert [len(e.ids) for e in examples] == [5, 6]
    assert counts == {"rows": 4, "truncated": 1, "skipped": 2}


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "hi"}\n{}\n', "line 1: a row needs prompt_ids and response_ids, found prompt"),
        ("not json\n\n\n", "line 1"),
        ('{"prompt_ids": [1], "response_ids": ["a"]}\n{}\n', "line 1: .*, lists of token ids"),
        ('{"prompt_ids": 1, "response_ids": [1]}\n{}\n', "line 1: .*, lists of token ids"),
        ('{"prompt_ids": [], "response_ids": [1]}\n', "No usable example"),
    ],
)
def test_bad_rows_name_the_line(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_examples([path], 10)


def test_packed_rows_are_read_like_others(tmp_path):
    rows = [{"prompt_ids": [1, 2], "response_ids": [3, 4 + i]} for i in range(9)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    plain, packed = tmp_path / "data.jsonl", tmp_path / "data.jsonl.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_examples([packed], 10) == read_examples([plain], 10)


def test_files_that_cannot_be_read_are_one_sentence(tmp_path):
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b"{}" * 999)[:-9])
    for path in (tmp_path / "typo.jsonl", tmp_path, torn):
        with pytest.raises(UsageError, match=f"Cannot read {path}: "):
            read_examples([path], 10)


def test_cut_never_exceeds_the_limit():
    sizes = [3, 9, 1, 1, 4, 30, 2, 2]
    groups = cut(range(8), sizes, 12)
    assert [i for group in groups for i in group] == list(range(8))
    assert all(len(g) == 1 or len(g) * max(sizes[i] for i in g) <= 12 for g in groups)


def test_epochs_visit_every_text_once(checkpoint, tmp_path):
    cache = make_cache(tmp_path, checkpoint)
    epochs = [epoch_batches(cache, 40, seed=0, epoch=n) for n in (0, 1)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(len(cache)))
    assert epochs[0] != epochs[1]
    stream = training_batches(cache, 40, seed=0)
    first = [next(stream) for _ in range(3 * len(epochs[0]))]
    later = training_batches(cache, 40, seed=0, start_step=len(epochs[0]) + 2)
    assert next(later) == first[len(epochs[0]) + 2]


def test_roots_are_rounds():
    generator = torch.Generator().manual_seed(0)
    roots = draw_roots(5, 400, generator, longest=6)
    offsets = torch.arange(5, 405) - roots
    assert roots[0] == 5 and offsets.min() == 0 and offsets.max() == 5
    assert ((roots.diff() == 0) | (offsets[1:] == 0)).all()
    assert fixed_roots(10, 9, 4, 2).tolist() == [10, 10, 12, 12, 12, 12, 16, 16, 16]
    assert fixed_roots(10, 5, 4, 0).tolist() == [10, 10, 10, 10, 14]


def test_batches_line_up_with_targets(checkpoint, tmp_path):
    cache = make_cache(tmp_path, checkpoint)
    texts = [cache[i] for i in (0, 3, 7)]
    batch = collate(texts, [fixed_roots(t.first, len(t.pick), 4, 0) for t in texts], cache.layers)
    assert int(batch.chosen.sum()) == len(batch.pick) == sum(len(t.pick) for t in texts)
    assert (
        batch.positions[1][batch.chosen[1]] == texts[1].first + torch.arange(len(texts[1].pick))
    ).all()
    assert (batch.roots <= batch.positions).all() and batch.offsets.max() <= 3
    assert isinstance(cache, ShardCache)
