"""The model that ``custom_generate`` is handed: its weights are shared, watched and let go."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers.hf import HISPEC, PROMPT
from helpers.tiny_llama import save_tiny_llama
from transformers import (
    LlamaForCausalLM,
)

from hispec import hf
from hispec.errors import CheckpointError
from hispec.hf import generate_with
from hispec.model.checkpoint import open_checkpoint
from hispec.model.device import DTYPES
from hispec.model.module import ModuleWeights


def test_weights_that_change_are_seen(model) -> None:
    options = {"max_new_tokens": 10, "do_sample": False}
    before = model.generate(PROMPT, custom_generate=generate_with(), **options).tolist()
    first = hf.loaded_lm(model)
    assert hf.loaded_lm(model) is first
    weight = model.model.layers[0].mlp.down_proj.weight
    for change in ("data", "version"):
        kept = weight.detach().clone()
        with torch.no_grad():
            (weight.data if change == "data" else weight).mul_(-3.0)
        found = model.generate(PROMPT, custom_generate=generate_with(), **options).tolist()
        assert found == model.generate(PROMPT, **options).tolist() != before
        with torch.no_grad():
            weight.copy_(kept)
    assert model.generate(PROMPT, custom_generate=generate_with(), **options).tolist() == before


def test_tensors_are_shared_where_nothing_is_fused(model) -> None:
    lm = hf.loaded_lm(model, share=True)
    for mine, theirs in (
        (lm.model.blocks[1].down.weight, model.model.layers[1].mlp.down_proj.weight),
        (lm.model.blocks[1].output.weight, model.model.layers[1].self_attn.o_proj.weight),
        (lm.model.embedding.weight, model.model.embed_tokens.weight),
        (lm.model.head.weight, model.lm_head.weight),
    ):
        assert mine.data_ptr() == theirs.data_ptr()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_fingerprint_is_the_folders(make_llama, dtype: str) -> None:
    # so history and exits are found for a model in memory as for one on disk
    folder = make_llama()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    model.save_pretrained(folder)
    weights = ModuleWeights(model)
    assert weights.fingerprint == open_checkpoint(folder).fingerprint
    assert weights.tokenizer.eos_token == "<|eos|>"


def test_a_model_is_not_kept_alive(tmp_path) -> None:
    save_tiny_llama(tmp_path / "m", num_hidden_layers=2)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    model.generate(PROMPT, max_new_tokens=2, custom_generate=generate_with())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_hooks_would_not_run(model) -> None:
    handle = model.model.layers[2].mlp.up_proj.register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(CheckpointError, match="forward hooks"):
            model.generate(PROMPT, max_new_tokens=2, custom_generate=generate_with())
    finally:
        handle.remove()
    model.generate(PROMPT, max_new_tokens=2, custom_generate=generate_with())


def test_another_architecture_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(CheckpointError, match="not a Llama"):
        other.generate(PROMPT % 32, max_new_tokens=2, custom_generate=generate_with())


def test_adapters_of_peft(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    save_tiny_llama(tmp_path / "m", seed=4)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    options = {"max_new_tokens": 16, "do_sample": False}
    plain = base.generate(PROMPT, **options).tolist()
    for kind in ("lora", "dora"):
        config = peft.LoraConfig(
            r=4,
            target_modules=["q_proj", "down_proj", "up_proj"],
            init_lora_weights=False,
            use_dora=kind == "dora",
            lora_alpha=32,
        )
        wrapped = peft.get_peft_model(base, config, adapter_name=kind).eval()
        before = [p.detach().clone() for p in wrapped.parameters()]
        wanted = wrapped.generate(input_ids=PROMPT, **options).tolist()
        assert wanted != plain
        call = generate_with(hierarchy=HISPEC)
        assert wrapped.generate(PROMPT, custom_generate=call, **options).tolist() == wanted
        assert hf.generate(wrapped, PROMPT, **options).tolist() == wanted
        with wrapped.disable_adapter():
            found = wrapped.generate(PROMPT, custom_generate=call, **options).tolist()
            assert found == plain
        assert wrapped.generate(PROMPT, custom_generate=call, **options).tolist() == wanted
        for old, new in zip(before, wrapped.parameters(), strict=True):
            assert torch.equal(old, new), "the model was touched"
        base = wrapped.unload()
