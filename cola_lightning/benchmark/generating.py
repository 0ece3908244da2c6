"""Time generation."""

import statistics
import time
from typing import Any

import torch

from cola_lightning.benchmark.targets import GeneratingModel, eagerly
from cola_lightning.benchmark.training import turns
from cola_lightning.costs.counters import Recorder
from cola_lightning.models.generation import stream


def measure_generation(subjects: list[GeneratingModel], warmup: int, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Time greedy continuations of a micro-batch of random prompts (B, T), with a KV cache.

    Args:
        subjects: The networks.
        warmup: Tokens of a continuation that is made first and not timed, after its first token. Of a compiled network
            it has one at least, which waits for the compiler.
        rounds: Continuations of every subject.
        tokens: Length of a continuation.

    Returns:
        For each subject ``prepared``, how it was prepared; ``tokens_per_second`` of each round, over all rows, without
        the first token; ``first_token_seconds``, the median of the time in which the prompt is read;
        ``parameters``, their number; ``parameter_bytes``, with the factors of int8; ``peak_memory_bytes`` of the
        allocator on CUDA; ``counted_peak_bytes``, the most that is alive, with weights, uncompiled.
    """
    results: dict[str, dict[str, Any]] = {}
    firsts: dict[str, list[float]] = {}
    for number, subject in turns(subjects, rounds):
        if not number:
            _generate(subject, 1 + max(warmup, int(subject.compiled)))
            parameters = list(subject.network.parameters())
            weights = [*parameters, *subject.network.buffers()]
            with eagerly(), Recorder([*weights, subject.batch]) as recorder:
                _generate(subject, tokens)
            held = sum(weight.nbytes for weight in weights)
            results[subject.name] = {
                "name": subject.name, "prepared": subject.prepared, "batch": list(subject.shape), "new_tokens": tokens,
                "tokens_per_second": [], "parameters": sum(each.numel() for each in parameters),
                "parameter_bytes": held, "counted_peak_bytes": held + recorder.peak,
            }  # fmt: skip
            firsts[subject.name] = []
            subject.reset_peak_memory()
        first, rest = _generate(subject, tokens)
        firsts[subject.name].append(first)
        result = results[subject.name]
        result["tokens_per_second"].append(subject.shape[0] * (tokens - 1) / rest if tokens > 1 else 0.0)
        result["first_token_seconds"] = statistics.median(firsts[subject.name])
        result["peak_memory_bytes"] = subject.peak_memory()
    return list(results.values())


def _generate(subject: GeneratingModel, tokens: int) -> tuple[float, float]:
    """Return the seconds until the first token, and those of the rest."""
    wait = torch.cuda.synchronize if subject.device.type == "cuda" else lambda: None
    ids = subject.batch.to(subject.device)
    wait()
    times = [time.perf_counter()]
    with subject.autocast():
        continuation = stream(subject.model.network, ids, tokens, temperature=0)
        next(continuation)
        wait()
        times.append(time.perf_counter())
        for _ in continuation:
            pass
    wait()
    times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1]
