"""Continue prompts with a network that maps ids (B, T) to logits (B, T, V)."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cola_lightning.errors import InputError, UnusableModelError
from cola_lightning.models.kv_cache import Cache
from cola_lightning.models.llama import Llama


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as the rows of one batch: ids (B, T), and how many of each row are padding (B,)."""
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(ids) for ids in prompts])
    rows = [[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    return torch.tensor(rows), padding


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int, prefix: str = "--"
) -> None:
    """Refuse settings that :func:`stream` cannot work with.

    Args:
        max_new_tokens, temperature, top_k, top_p: As for :func:`stream`.
        seed: Of the generator.
        prefix: What stands before a setting's name in the message.

    Raises:
        InputError: If one is out of range.
    """
    least: dict[str, tuple[float, float]] = {"max_new_tokens": (max_new_tokens, 1), "temperature": (temperature, 0)}
    if top_k is not None:
        least["top_k"] = (top_k, 1)
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise InputError(f"{prefix}{name} is {value}; it must be at least {minimum}")
    if not math.isfinite(temperature):
        raise InputError(f"{prefix}temperature is {temperature}; it must be a number of at least 0")
    if not -(2**63) <= seed < 2**64:
        raise InputError(f"{prefix}seed is {seed}; it must lie between -2^63 and 2^64 - 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"{prefix}top_p is {top_p}; it must lie above 0 and not above 1")


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

    Args:
        network: Reads each token once, and keeps keys and values. A row that has outgrown its
            ``max_position_embeddings`` is shown its last so many tokens, anew for each next one.
        ids: Prompts (B, T), T at least 1.
        max_new_tokens: Tokens to add at most.
        padding: How many ids at the beginning of each row are no part of the prompt (B,); none, if not given.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among the k likeliest only.
        top_p: Sample among the likeliest that together have this probability (nucleus sampling, arXiv 1904.09751).
        stop_id: End once every row has produced this id; a row that has is filled up with it.
        generator: Source of randomness.

    Yields:
        The next token of each row (B, 1).
    """
    limit = network.config.max_position_embeddings
    cache = Cache(len(network.model.layers), min(limit, ids.shape[1] + max_new_tokens))
    padded = padding is not None and bool(padding.any())

    def documents(begin: int, end: int) -> Tensor | None:
        """Padding is a document of its own. Only distances count for rotary positions, so it shifts nothing."""
        if not padded:
            return None
        return (torch.arange(begin, end, device=ids.device) >= padding.to(ids.device)[:, None]).long()

    done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        length = ids.shape[1]
        with torch.compiler.set_stance("force_eager"):  # a graph for each length would cost more than it saves
            if length <= limit:
                logits = network(ids[:, cache.length :], documents(0, length), cache, last_only=True)
            else:
                logits = network(ids[:, -limit:], documents(length - limit, length), last_only=True)
        token = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
        if stop_id is not None:
            token = token.masked_fill(done, stop_id)
            done = done | (token == stop_id)
        ids = torch.cat((ids, token), dim=1)
        yield token
        if stop_id is not None and bool(done.all()):
            return


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id (B, 1) of each row of logits (B, V); arguments as for :func:`stream`.

    Raises:
        UnusableModelError: If a logit is NaN.
    """
    if bool(logits.isnan().any()):
        raise UnusableModelError("the logits are NaN: the network overflows in its dtype; take an earlier checkpoint")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # Less the largest, and by what float32 can still divide by, so that a tiny temperature makes that one certain.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, places = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the one that reaches top_p is still in
        logits = logits.masked_fill(beyond.scatter(-1, places, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def generate(network: Llama, ids: Tensor, max_new_tokens: int, **options) -> Tensor:
    """Prompts (B, T) and continuations (B, T + at most ``max_new_tokens``); options as for :func:`stream`."""
    return torch.cat((ids, *stream(network, ids, max_new_tokens, **options)), dim=1)
