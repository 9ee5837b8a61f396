"""``model.generate(custom_generate=…)`` against transformers' own ``generate``, in fp32."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers.tiny_llama import byte_tokenizer, save_tiny_llama
from transformers import (
    LlamaForCausalLM,
    LogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
    TextIteratorStreamer,
)

from hispec import hf
from hispec.errors import CheckpointError, UsageError
from hispec.hf import generate_with
from hispec.hierarchy import Hierarchy, Level
from hispec.model.checkpoint import open_checkpoint
from hispec.model.device import DTYPES
from hispec.model.module import ModuleWeights
from hispec.processors import build
from hispec.sampling import Sampling

PROMPT = torch.tensor([[5, 9, 33, 70, 71, 5, 9, 200, 14, 33, 70]])
LAYERSKIP = Hierarchy((Level(2, 3),))
HISPEC = Hierarchy((Level(1, 2), Level(3, 4)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("hf") / "llama"
    save_tiny_llama(folder, seed=3)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Backwards(LogitsProcessor):
    """The user's own: no token that is larger than the last one plus 40."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, last in enumerate(input_ids[:, -1].tolist()):
            scores[row, last + 41 :] = -torch.inf
        return scores


class AfterTen(StoppingCriteria):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= PROMPT.shape[1] + 10)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[70], [14, 33]]},
    "at least": {"min_new_tokens": 12, "eos_token_id": list(range(0, 320, 7))},
    "eos": {"eos_token_id": list(range(0, 320, 29))},
    "forced": {"forced_eos_token_id": 77},
    "suppressed": {"suppress_tokens": [3, 4, 5], "begin_suppress_tokens": list(range(100))},
    "bias": {"sequence_bias": [[[9], 3.0], [[9, 33], -10.0]]},
    "decay": {"exponential_decay_length_penalty": (4, 1.5)},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 5},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


@pytest.mark.parametrize("hierarchy", ["ar", LAYERSKIP, HISPEC], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_are_transformers(model, case: str, hierarchy) -> None:
    options = {"max_new_tokens": 24, "do_sample": False, **CASES[case]}
    wanted = model.generate(PROMPT, **options)
    found = model.generate(PROMPT, custom_generate=generate_with(hierarchy=hierarchy), **options)
    if case != "scores":
        assert found.tolist() == wanted.tolist()
        return
    assert found.sequences.tolist() == wanted.sequences.tolist()
    for mine, theirs in ((found.scores, wanted.scores), (found.logits, wanted.logits)):
        torch.testing.assert_close(torch.cat(mine), torch.cat(theirs), rtol=1e-4, atol=1e-4)
    transitions = model.compute_transition_scores(
        wanted.sequences, wanted.scores, normalize_logits=True
    )
    torch.testing.assert_close(found.logprobs, transitions, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hierarchy", ["ar", HISPEC], ids=str)
def test_the_users_processors_and_criteria(model, hierarchy) -> None:
    options = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.2}
    mine, theirs = AfterTen(), AfterTen()
    wanted = model.generate(
        PROMPT, logits_processor=[Backwards()], stopping_criteria=[theirs], **options
    )
    found = model.generate(
        PROMPT,
        logits_processor=[Backwards()],
        stopping_criteria=[mine],
        custom_generate=generate_with(hierarchy=hierarchy),
        **options,
    )
    assert found.tolist() == wanted.tolist()
    assert found.shape[1] == PROMPT.shape[1] + 10
    assert mine.seen == theirs.seen  # once a token, in order


def test_streamer_and_stop_string(model) -> None:
    tokenizer = byte_tokenizer()
    options = {"max_new_tokens": 40, "do_sample": False}
    text = tokenizer.decode(model.generate(PROMPT, **options)[0, PROMPT.shape[1] :])
    stop = next(c for c in text[4:] if c.isascii() and c.isprintable() and c not in text[:4])
    streams = [TextIteratorStreamer(tokenizer, skip_prompt=True) for _ in range(2)]
    wanted = model.generate(
        PROMPT, stop_strings=[stop], tokenizer=tokenizer, streamer=streams[0], **options
    )
    found = hf.generate(
        model,
        PROMPT,
        stop_strings=[stop],
        tokenizer=tokenizer,
        streamer=streams[1],
        hierarchy=HISPEC,
        **options,
    )
    assert found.tolist() == wanted.tolist() and found.shape[1] < PROMPT.shape[1] + 40
    assert "".join(streams[0]) == "".join(streams[1]) != ""
    # a streamer given to generate() itself reaches us as well, as criteria do
    stream = TextIteratorStreamer(tokenizer, skip_prompt=True)
    again = model.generate(
        PROMPT,
        stopping_criteria=[StopStringCriteria(tokenizer, [stop])],
        streamer=stream,
        custom_generate=generate_with(hierarchy=LAYERSKIP),
        **options,
    )
    assert again.tolist() == wanted.tolist()
    assert stop in "".join(stream)


def test_rows_of_a_batch(model) -> None:
    # padding on the left; every row is what it is alone, processors see the batch's shape
    short = PROMPT[:, 4:]
    batch = torch.cat([PROMPT, torch.cat([torch.full((1, 4), 260), short], -1)])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 260,
        "repetition_penalty": 1.3,
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(row, 320, 2)),
        "eos_token_id": list(range(0, 320, 29)),
    }
    wanted = model.generate(batch, attention_mask=mask, **options)
    call = generate_with(hierarchy=HISPEC)
    found = model.generate(batch, attention_mask=mask, custom_generate=call, **options)
    assert found.tolist() == wanted.tolist()
    assert [result.num_prompt_tokens for result in call.results] == [11, 7]


# ------------------------------------------------------------------ sampling


def sampled(model, seed: int, hierarchy: Any = "ar", **options: Any) -> list[list[int]]:
    call = generate_with(hierarchy=hierarchy, seed=seed)
    options = {"max_new_tokens": 16, "do_sample": True, **options}
    return model.generate(PROMPT, custom_generate=call, **options).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.4, "top_k": 12, "min_p": 0.02, "typical_p": 0.95},
        {"repetition_penalty": 1.2, "top_k": 50},
    ],
)
def test_samples_do_not_depend_on_the_hierarchy(model, settings) -> None:
    for seed in range(3):
        wanted = sampled(model, seed, **settings)
        assert sampled(model, seed, LAYERSKIP, **settings) == wanted
        assert sampled(model, seed, HISPEC, **settings) == wanted
    assert sampled(model, 1, **settings) != sampled(model, 2, **settings)


def test_a_seed_gives_the_same_text_as_without_transformers(model, tmp_path) -> None:
    import hispec

    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    lm = hispec.load(tmp_path, dtype="fp32", device="cpu")
    for settings in ({"temperature": 0.7, "top_k": 0}, {"temperature": 0.8, "top_p": 0.9}):
        text = lm.generate(PROMPT[0].tolist(), max_new_tokens=16, seed=5, **settings)
        given = {"top_k": 0, **settings}
        assert sampled(model, 5, **given)[0][PROMPT.shape[1] :] == text.token_ids


def test_torch_fixes_the_seed_where_none_is_given(model) -> None:
    texts = []
    for torch_seed in (1, 1, 2):
        torch.manual_seed(torch_seed)
        call = generate_with()
        options = {"max_new_tokens": 16, "do_sample": True, "num_return_sequences": 2}
        texts.append(model.generate(PROMPT, custom_generate=call, **options).tolist())
        assert call.results[0].seed is not None
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1], "two samples of one prompt have noise of their own"


def test_the_order_of_rules_is_transformers(model) -> None:
    from transformers import GenerationConfig

    settings: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[3], [4, 5]],
        "forced_bos_token_id": 7,
        "forced_eos_token_id": 8,
        "suppress_tokens": [10],
        "begin_suppress_tokens": [11],
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "typical_p": 0.9,
    }
    config = GenerationConfig(
        do_sample=True, min_new_tokens=4, max_length=40, eos_token_id=259, **settings
    )
    model._prepare_special_tokens(config, device="cpu")
    own = Backwards()
    wanted = model._get_logits_processor(config, 11, PROMPT, logits_processor=[own], device="cpu")
    found = build(Sampling(processors=[own], **settings), 11, 320, (259,), 4, 29)
    assert [type(rule) for rule in found] == [type(rule) for rule in wanted]
    scores = torch.randn(1, 320)
    for length in (11, 14, 39):
        ids = torch.randint(320, (1, length))
        mine, theirs = scores.clone(), wanted(ids, scores.clone())
        for rule in found:
            mine = rule(ids, mine)
        assert torch.equal(mine, theirs)


# ------------------------------------------------------------------ aliases, refusals, weights


def test_transformers_names_for_drafting(model) -> None:
    options = {"max_new_tokens": 20, "do_sample": False}
    wanted = model.generate(PROMPT, **options).tolist()
    for names, exits, sources in (
        ({"assistant_early_exit": 2, "num_assistant_tokens": 3}, (2,), {}),
        ({"prompt_lookup_num_tokens": 4}, (), {"context": 4}),
    ):
        call = generate_with()
        assert model.generate(PROMPT, custom_generate=call, **names, **options).tolist() == wanted
        hierarchy = call.results[0].hierarchy
        assert hierarchy.exit_layers == exits and dict(hierarchy.sources) == sources


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"num_beams": 2, "do_sample": True}, "num_beams"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "input"),
    ],
)
def test_modes_that_are_not_built(model, options, word: str) -> None:
    call = generate_with(hierarchy="ar")
    with pytest.raises(UsageError, match=word):
        model.generate(
            None if "inputs_embeds" in options else PROMPT,
            custom_generate=call,
            max_new_tokens=3,
            **options,
        )


def test_an_assistant_model_is_refused(model) -> None:
    with pytest.raises(UsageError, match="assistant_model"):
        model.generate(PROMPT, assistant_model=model, custom_generate=generate_with())


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


def test_a_processor_that_raises_leaves_the_model_usable(model) -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > PROMPT.shape[1] + 5:
                raise ZeroDivisionError("mine")
            return scores

    options = {"max_new_tokens": 16, "do_sample": False}
    wanted = model.generate(PROMPT, **options).tolist()
    call = generate_with(hierarchy=HISPEC)
    with pytest.raises(ZeroDivisionError, match="mine"):
        model.generate(PROMPT, logits_processor=[Broken()], custom_generate=call, **options)
    assert model.generate(PROMPT, custom_generate=call, **options).tolist() == wanted
