"""Seeds: the seed alone fixes a sampled text; and the sampler's law: it is a sample."""

from __future__ import annotations

import torch
from helpers.laws import random_prompt
from helpers.lms import chain

from hispec.sampling import Sampling


def test_the_seed_fixes_the_text_whatever_the_hierarchy_or_limit(zoo) -> None:
    lm = zoo("gqa")
    prompt = random_prompt(1, 20)
    texts = {}
    for seed in (0, 1, 2**32, 2**40 + 1, -1):
        sampling = Sampling(1.0, seed)
        whole = lm.generate(prompt, hierarchy="ar", max_new_tokens=30, sampling=sampling)
        texts[seed] = tuple(whole.token_ids)
        for limit in (1, 7, 30):
            for hierarchy in ("ar", "layerskip", "hispec", chain((1, 5), (2, 1), (4, 6))):
                part = lm.generate(
                    prompt, hierarchy=hierarchy, max_new_tokens=limit, sampling=sampling
                )
                assert part.token_ids == whole.token_ids[:limit]
    assert len(set(texts.values())) == len(texts), "two seeds gave one text"


def test_leaving_early_does_not_show_in_the_next_text(zoo) -> None:
    lm, sampling = zoo("gqa"), Sampling(1.0, seed=9)
    options = {"hierarchy": chain((1, 3), (3, 5)), "max_new_tokens": 30, "sampling": sampling}
    prompt = random_prompt(2, 20)
    wanted = lm.generate(prompt, **options).token_ids
    for leave in (1, 2, 5, 11):
        stream = lm.stream(prompt, **options)
        for _ in stream:
            if stream.result.num_tokens >= leave:
                break
        got = stream.result.token_ids
        assert got == wanted[: len(got)]
        assert lm.generate(prompt, **options).token_ids == wanted


def test_the_prompt_in_two_parts_gives_the_same_noise(zoo) -> None:
    # The noise belongs to positions in the text, not to how it came about.
    lm, sampling = zoo("gqa"), Sampling(1.0, seed=6)
    prompt = random_prompt(3, 20)
    whole = lm.generate(prompt, max_new_tokens=30, sampling=sampling).token_ids
    rest = lm.generate([*prompt, *whole[:12]], max_new_tokens=18, sampling=sampling).token_ids
    assert rest == whole[12:]


def test_frequencies_match_the_softmax(zoo) -> None:
    """Chi-square of the first token over 3,000 seeds and of the second: false alarms 2 in 10⁶ runs.

    The second is conditional on the first; it is tested behind the most frequent first one.
    """
    lm, temperature, hierarchy = zoo("gqa"), 0.5, chain((1, 2))
    prompt, runs = random_prompt(5, 12), 3000
    firsts, seconds = [], []
    model = lm.model
    with torch.inference_mode():
        cache = model.new_cache([6])
        model.prefill(cache, prompt)
        logits = model.logits(cache.states[6][11:12])
        tokens = [Sampling(temperature, seed).pick(logits, 12)[0] for seed in range(runs)]
        check_frequencies(tokens, logits[0], temperature)
    common = max(set(tokens), key=tokens.count)
    for seed in [seed for seed in range(runs) if tokens[seed] == common][:300]:
        ids = lm.generate(
            prompt, hierarchy=hierarchy, max_new_tokens=3, sampling=Sampling(temperature, seed)
        ).token_ids
        firsts.append(ids[0])
        seconds.append(ids[1])
    assert set(firsts) == {common}
    with torch.inference_mode():
        model.prefill(cache, [*prompt, common])
        logits = model.logits(cache.states[6][12:13])
    check_frequencies(seconds, logits[0], temperature)


def check_frequencies(tokens: list[int], logits: torch.Tensor, temperature: float) -> None:
    """Chi-square with rare tokens pooled; z > 6 has odds below 1e-6 for these degrees of freedom.

    Wilson-Hilferty: (χ²/k)^(1/3) is about normal with mean 1 − 2/(9k) and variance 2/(9k). Its
    upper tail at z = 6 is below 1e-6 for k ≥ 3 even where expected counts are as small as 8.
    """
    p = (logits.double() / temperature).softmax(0)
    expected = p * len(tokens)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(p)).double()
    large = expected >= 8
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    counts = torch.cat([counts[large], counts[~large].sum()[None]])
    keep = expected > 0
    assert keep.sum() >= 4, "the softmax is too sharp to test anything"
    chi = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    k = float(keep.sum() - 1)
    z = ((chi / k) ** (1 / 3) - (1 - 2 / (9 * k))) / (2 / (9 * k)) ** 0.5
    assert z < 6, f"chi-square {chi:.1f} at {k:.0f} degrees of freedom"
