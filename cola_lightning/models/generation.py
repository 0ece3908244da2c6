"""Continue a prompt with a network that maps ids (B, T) to logits (B, T, V)."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    network: nn.Module,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample a continuation of each row.

    Args:
        network: Ids (B, T) -> logits (B, T, V); accepts at most ``network.max_position_embeddings`` tokens, beyond
            which it is shown the last so many.
        ids: Prompts (B, T), T at least 1.
        max_new_tokens: Tokens to add at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among the k likeliest only.
        stop_id: End once every row has produced this id; a row that has is filled up with it.
        generator: Source of randomness.

    Returns:
        Prompts and continuations (B, T + at most ``max_new_tokens``).
    """
    done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        logits = network(ids[:, -network.max_position_embeddings :])[:, -1].float()
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            if top_k is not None and top_k < logits.shape[-1]:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        if stop_id is not None:
            token = token.masked_fill(done, stop_id)
            done = done | (token == stop_id)
        ids = torch.cat((ids, token), dim=1)
        if stop_id is not None and bool(done.all()):
            break
    return ids
