"""Count what a training step computes and keeps: the same numbers on any machine, whatever else it does."""

from functools import partial
from typing import Any

from torch import Tensor

from cola_lightning.benchmark.targets import BenchmarkTarget, PackageModel, eagerly
from cola_lightning.costs.counters import Recorder, count_flops, kept_bytes
from cola_lightning.models.llama import run_layers


def count(subject: BenchmarkTarget) -> dict[str, Any]:
    """Count the FLOPs and bytes of a step, without compiled code.

    Returns:
        ``parameters``; ``flops_forward`` and ``flops_step`` of the whole network, recompute included; ``flops_model``,
        the same without recompute; ``flops_optimizer``, of the matrix products in an optimizer step;
        ``parameter_bytes``, ``gradient_bytes`` and ``optimizer_state_bytes``; ``counted_peak_bytes``, the most that is
        alive during a step, without what an operation allocates and frees inside.
        Networks of this package also have ``layers``, the FLOPs of the decoder layers alone;
        ``saved_bytes_per_token_per_layer``, the bytes that one more layer keeps from forward to backward, its input
        included; and ``saved_hidden_states_per_layer``, the same number in bf16 hidden states (2 D bytes).
    """
    with eagerly():
        result: dict[str, Any] = {
            "parameters": sum(parameter.numel() for parameter in subject.network.parameters()),
            "flops_forward": count_flops(subject.forward),
            "flops_step": count_flops(lambda: subject.forward().backward()),
            "flops_model": subject.model_flops(),
            "flops_optimizer": count_flops(subject.optimizer.step),
        }
        parameters, states = list(subject.network.parameters()), subject.states()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sizes: dict[str, list[Tensor]] = {
            "parameter_bytes": list(parameters), "gradient_bytes": gradients, "optimizer_state_bytes": states,
        }  # fmt: skip
        result |= {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in sizes.items()}
        del gradients, sizes  # so that a step may free them
        subject.optimizer.zero_grad()
        known = [*parameters, *subject.network.buffers(), *states, subject.batch]
        with Recorder(known) as recorder:
            subject.step()
        held = result["parameter_bytes"] + result["optimizer_state_bytes"]
        result["counted_peak_bytes"] = held + recorder.peak
        if isinstance(subject, PackageModel):
            result |= _layers(subject)
    return result


def _layers(subject: PackageModel) -> dict[str, Any]:
    decoder = subject.model.network.model
    layers, length = decoder.layers, subject.shape[1]
    hidden = decoder.embed_tokens(subject.batch.to(subject.device)).detach().requires_grad_()
    rotary = decoder.rotary(length, like=hidden)

    def first(count: int) -> Tensor:
        with subject.autocast():
            return run_layers(layers[:count], hidden, rotary)

    known = [*subject.network.parameters(), hidden, *rotary[:2]]
    # The output of the last layer is the input of the next. Each layer counts with one of them.
    more, fewer = (kept_bytes(partial(first, n), known) for n in (len(layers), len(layers) - 1))
    per_layer = (more - fewer) / subject.batch.numel()
    result = {
        "layers": {
            "flops_forward": count_flops(lambda: first(len(layers))),
            "flops_step": count_flops(lambda: first(len(layers)).float().square().mean().backward()),
        },
        "saved_bytes_per_token_per_layer": per_layer,
        "saved_hidden_states_per_layer": per_layer / (2 * hidden.shape[-1]),
    }
    subject.optimizer.zero_grad()
    return result
