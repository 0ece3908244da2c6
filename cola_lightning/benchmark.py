"""What a training step costs, measured: FLOPs counted by operation, bytes by what stays alive, time by the clock."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cola_lightning.callbacks import CoLAM, CRNetRecompute
from cola_lightning.costs.counters import count_flops, kept_bytes
from cola_lightning.models.llama import rotary_table, through
from cola_lightning.module import LanguageModel
from cola_lightning.optim import Parameters


def benchmark(
    trainer: L.Trainer, model: LanguageModel, batch_size: int, sequence_length: int, steps: int = 5
) -> dict[str, Any]:
    """Measure training steps on random tokens with the checkpointing, precision and device of ``trainer``.

    Args:
        trainer: Built, but not running.
        model: Its network is built here.
        batch_size: Rows (B).
        sequence_length: Tokens of a row (T).
        steps: Timed steps, after two that are not.

    Returns:
        ``parameters``; ``flops_forward`` and ``flops_step`` of the whole network, and under ``layers`` of the decoder
        layers alone; ``saved_bytes_per_token_per_layer``, what one more layer keeps between forward and backward, its
        input included, and ``saved_hidden_states_per_layer``, the same in bf16 hidden states (2 D bytes);
        ``flops_optimizer`` of the matrix products in an optimizer step, ``parameter_bytes``, ``gradient_bytes`` and
        ``optimizer_state_bytes`` after it; ``tokens_per_second``, the median, and ``tokens_per_second_range``;
        ``peak_memory_bytes`` on CUDA, else None.
    """
    device = trainer.strategy.root_device
    for callback in trainer.callbacks:
        if isinstance(callback, CoLAM | CRNetRecompute):
            callback.setup(trainer, model, "fit")
    with trainer.precision_plugin.module_init_context():
        model.configure_model()
    trainer.precision_plugin.convert_module(model.to(device))
    context = trainer.precision_plugin.forward_context
    ids = torch.randint(model.vocab_size, (batch_size, sequence_length), device=device)
    layers = model.network.model.layers
    hidden = model.network.model.embed_tokens(ids).detach().requires_grad_()
    rotary = rotary_table(sequence_length, model.network.model.head_dim, model.network.model.rope_theta, like=hidden)

    def loss() -> Tensor:
        with context():
            return model.training_step({"input_ids": ids, "labels": ids}, 0)

    def first(count: int) -> Tensor:
        with context():
            return through(layers[:count], hidden, rotary)

    def step_of_layers() -> None:
        first(len(layers)).float().square().mean().backward()

    known = [*model.parameters(), hidden, *rotary[:2]]
    more, fewer = (kept_bytes(lambda n=n: first(n), known) for n in (len(layers), len(layers) - 1))
    # What the last layer hands on is the next one's input: each layer is charged with one.
    per_layer = (more - fewer) / ids.numel()
    result: dict[str, Any] = {
        "parameters": model.parameter_count,
        "flops_forward": count_flops(loss),
        "flops_step": count_flops(lambda: loss().backward()),
        "layers": {
            "flops_forward": count_flops(lambda: first(len(layers))),
            "flops_step": count_flops(step_of_layers),
        },
        "saved_bytes_per_token_per_layer": per_layer,
        "saved_hidden_states_per_layer": per_layer / (2 * hidden.shape[-1]),
    }
    model.zero_grad()
    optimizer = model.make_optimizer(Parameters(model.network))
    loss().backward()
    result["flops_optimizer"] = count_flops(optimizer.step)
    state = [leaf for leaf in tree_leaves([*optimizer.state.values()]) if isinstance(leaf, Tensor)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sizes = {"parameter_bytes": model.parameters(), "gradient_bytes": gradients, "optimizer_state_bytes": state}
    result |= {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in sizes.items()}
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    speeds = sorted(ids.numel() / seconds for seconds in times[2:])
    result["tokens_per_second"] = statistics.median(speeds)
    result["tokens_per_second_range"] = [speeds[0], speeds[-1]]
    result["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return result


def report(result: dict[str, Any], file: str | None) -> None:
    """Print the result, and write it to ``file`` as JSON."""
    text = json.dumps(result, indent=2)
    print(text)
    if file:
        Path(file).write_text(text + "\n", encoding="utf-8")
