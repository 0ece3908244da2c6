"""Text generation: continue prompts, token by token, with a KV cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cola_lightning.models.generation_step import CompiledStep
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

    A network that :func:`~cola_lightning.inference.prepare.prepare_for_generation` has compiled computes each token of
    a single row by its compiled step, except where the text is longer than ``max_position_embeddings``.

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
    step: CompiledStep | None = network.generation_step
    (rows, begin), device = ids.shape, ids.device
    cache = Cache(len(network.model.layers), min(limit, begin + max_new_tokens))
    # All ids in one buffer, so that appending a token does not copy those before it
    ids = torch.cat((ids, ids.new_empty(rows, max_new_tokens)), dim=1)
    if padding is not None:
        padding = padding.to(device) if bool(padding.any()) else None

    def document_ids(first: int, end: int) -> Tensor | None:
        """Make the padding a document of its own. It shifts no position, because only distances count in RoPE."""
        if padding is None:
            return None
        return (torch.arange(first, end, device=device) >= padding[:, None]).long()

    done = torch.zeros(rows, 1, dtype=torch.bool, device=device)
    for length in range(begin, begin + max_new_tokens):
        unread = ids[:, cache.length : length]
        if step is not None and length <= limit and padding is None and step.takes(unread, cache):
            logits = step(unread, cache)
        else:
            with torch.compiler.set_stance("force_eager"):  # a graph for each length would cost more than it saves
                if length <= limit:
                    logits = network(unread, document_ids(0, length), cache, last_only=True)
                else:
                    last = ids[:, length - limit : length]
                    logits = network(last, document_ids(length - limit, length), last_only=True)
        token = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
        if stop_id is not None:
            token = token.masked_fill(done, stop_id)
            done = done | (token == stop_id)
        ids[:, length : length + 1] = token
        yield token
        if stop_id is not None and bool(done.all()):
            return


def generate(network: Llama, ids: Tensor, max_new_tokens: int, **options) -> Tensor:
    """Continue prompts (B, T); return them with their continuations (B, T + up to ``max_new_tokens``).

    Args:
        options: As for :func:`stream`.
    """
    return torch.cat((ids, *stream(network, ids, max_new_tokens, **options)), dim=1)
