"""Text generation: continue prompts, token by token, with a KV cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cola_lightning.models.kv_cache import Cache
from cola_lightning.models.llama import Llama
from cola_lightning.models.sampling import sample


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Make one batch of prompts of different lengths.

    Returns:
        Ids (B, T) padded on the left, and the number of padding ids of each row (B,).
    """
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(ids) for ids in prompts])
    rows = [[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    return torch.tensor(rows), padding


@torch.no_grad()
def stream(
    network: Llama,
    ids: Tensor,
    max_new_tokens: int,
    *,
    padding: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Sample a continuation of each row, token by token.

    A row longer than the network's ``max_position_embeddings`` is cut to its last tokens, and the network reads all of
    these again for each new token. Up to that length, it reads each token once.

    Args:
        network: The network.
        ids: Prompts (B, T), T at least 1.
        max_new_tokens: Most tokens to add.
        padding: Number of padding ids at the beginning of each row (B,); none if not given.
        temperature, top_k, top_p, generator: As for :func:`~cola_lightning.models.sampling.sample`.
        stop_id: End once every row has produced this id. A row that has produced it is filled up with it.

    Yields:
        The next token of each row (B, 1).
    """
    limit = network.config.max_position_embeddings
    cache = Cache(len(network.model.layers), min(limit, ids.shape[1] + max_new_tokens))
    if padding is not None:
        padding = padding.to(ids.device) if bool(padding.any()) else None

    def document_ids(begin: int, end: int) -> Tensor | None:
        """Make the padding a document of its own. It shifts no position, because only distances count in RoPE."""
        if padding is None:
            return None
        return (torch.arange(begin, end, device=ids.device) >= padding[:, None]).long()

    done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        length = ids.shape[1]
        with torch.compiler.set_stance("force_eager"):  # a graph for each length would cost more than it saves
            if length <= limit:
                logits = network(ids[:, cache.length :], document_ids(0, length), cache, last_only=True)
            else:
                logits = network(ids[:, -limit:], document_ids(length - limit, length), last_only=True)
        token = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
        if stop_id is not None:
            token = token.masked_fill(done, stop_id)
            done = done | (token == stop_id)
        ids = torch.cat((ids, token), dim=1)
        yield token
        if stop_id is not None and bool(done.all()):
            return


def generate(network: Llama, ids: Tensor, max_new_tokens: int, **options) -> Tensor:
    """Continue prompts (B, T); return them with their continuations (B, T + up to ``max_new_tokens``).

    Args:
        options: As for :func:`stream`.
    """
    return torch.cat((ids, *stream(network, ids, max_new_tokens, **options)), dim=1)
