"""What a text alone is answered with, by transformers: what decoding in batches must equal."""

import torch


def alone(model, request, eos):
    """One row, no cache, no batch: the specification of a greedy or sampled continuation."""
    ids, new = list(request.prompt_ids), []
    generator = torch.Generator().manual_seed(request.seed)
    uniforms = torch.rand(request.max_new_tokens, generator=generator)
    while len(new) < request.max_new_tokens:
        logits = model(torch.tensor([ids + new])).logits[0, -1].float()
        if request.temperature > 0:
            sums = (logits / request.temperature).softmax(-1).cumsum(-1)
            token = int((sums <= uniforms[len(new)] * sums[-1]).sum())
        else:
            token = int(logits.argmax())
        new.append(token)
        if token in eos:
            return new, "eos"
    return new, "length"
