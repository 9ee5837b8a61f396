"""Plain batches of the model's answers: states, company, ties and samples."""

import random
from pathlib import Path

import pytest
import torch
from training.decode_setup import alone

from hispec.errors import UsageError
from hispec.model.checkpoint import open_checkpoint
from hispec_training.decode import BatchDecoder, Request, _argmax
from hispec_training.trunk import Trunk

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return open_checkpoint(tiny_llama)


@pytest.fixture(scope="module")
def reference(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def prompts(count, low=1, high=90, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(low, high))] for _ in range(count)]


VARIANTS = {
    "gqa": {},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_states_are_those_of_transformers(make_llama, config):
    from transformers import AutoModelForCausalLM

    folder = make_llama(**config)
    trunk = Trunk(open_checkpoint(folder), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = prompts(5)
    lengths = torch.tensor([len(t) for t in texts])
    ids = torch.zeros(5, int(lengths.max()) + 7, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    states = trunk.states(ids, lengths, (6, 0, 2))
    assert sorted(states) == [0, 2, 6]
    captured = []
    model.model.layers[-1].register_forward_hook(lambda m, args, out: captured.append(out))
    for row, text in enumerate(texts):
        got = model(torch.tensor([text]), output_hidden_states=True)
        for e in (0, 2):
            close(states[e][row, : len(text)], got.hidden_states[e][0])
        close(states[6][row, : len(text)], captured[-1][0])  # hidden_states[-1] is after the norm
        close(trunk.logits(states[6][row, : len(text)]), got.logits[0])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_layers_that_do_not_exist_are_refused(checkpoint):
    with pytest.raises(UsageError, match=r"\[0, 6\].*got 7"):
        Trunk(checkpoint, torch.float32).states(torch.zeros(1, 3, dtype=torch.long), [3], (7,))


@torch.no_grad()
def test_company_changes_nothing(checkpoint, reference):
    """37 rows through a batch of 20, greedy and sampled, equal each decoded alone (fp32)."""
    rng = random.Random(1)
    requests = [
        Request(p, rng.choice([1, 20, 90]), rng.choice([0.0, 0.8, 1.5]), seed)
        for seed, p in enumerate(prompts(37))
    ]
    eos = (259, 7, 8, 9)  # common enough to end some rows early
    ended = []
    decoder = BatchDecoder(Trunk(checkpoint, torch.float32), eos, rows=20)
    answers = decoder.decode(requests, lambda answer: ended.append(answer.index))
    assert sorted(ended) == list(range(37))
    finishes = set()
    for request, answer in zip(requests, answers, strict=True):
        ids, finish = alone(reference, request, eos)
        assert (answer.ids, answer.finish) == (ids, finish)
        finishes.add(finish)
    assert finishes == {"eos", "length"}


def test_packed_and_plain_weights_agree(checkpoint):
    requests = [Request(p, 12) for p in prompts(3)]
    both = [
        BatchDecoder(Trunk(checkpoint, torch.float32, pack=pack), (), 3).decode(requests)
        for pack in (True, False)
    ]
    assert [a.ids for a in both[0]] == [a.ids for a in both[1]]


def test_edge_requests(checkpoint):
    decoder = BatchDecoder(Trunk(checkpoint, torch.float32), (), rows=4)
    assert decoder.decode([]) == []
    answers = decoder.decode([Request([5], 0), Request([5], 1)])
    assert [len(a.ids) for a in answers] == [0, 1]


@pytest.mark.parametrize("width", [256, 320, 100])
def test_block_argmax_takes_the_first_of_ties(width):
    logits = torch.randint(0, 4, (50, width), generator=torch.Generator().manual_seed(0)).bfloat16()
    first = [(row == row.max()).nonzero()[0, 0].item() for row in logits]
    assert _argmax(logits).tolist() == first


def test_sampling_follows_the_softmax(checkpoint, reference):
    """Counts of 2,000 first tokens; chi-square over likely tokens, false alarm below 1e-6."""
    n, heat = 2000, 0.7
    prompt = prompts(1, 20, 20)[0]
    decoder = BatchDecoder(Trunk(checkpoint, torch.float32), (), rows=250)
    answers = decoder.decode([Request(prompt, 1, heat, seed) for seed in range(n)])
    counts = torch.bincount(torch.tensor([a.ids[0] for a in answers]), minlength=320).double()
    with torch.no_grad():
        p = (reference(torch.tensor([prompt])).logits[0, -1].double() / heat).softmax(-1)
    likely = p * n >= 10
    expected = torch.cat([p[likely], p[~likely].sum()[None]]) * n
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
    square = ((seen - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    # Wilson-Hilferty: chi-square's cube root is nearly normal; 5 sigma is 3e-7
    z = ((square / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    assert degrees > 5
    assert z < 5
