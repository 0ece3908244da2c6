"""What a training step computes and keeps, counted: the same on any machine, whatever else it does."""

from typing import Any

from torch import Tensor

from cola_lightning.benchmark.targets import BenchmarkTarget, PackageModel, eagerly
from cola_lightning.costs.counters import Recorder, count_flops, kept_bytes
from cola_lightning.models.llama import run_layers


def count(subject: BenchmarkTarget) -> dict[str, Any]:
    """FLOPs and bytes of a step, uncompiled.

    Returns:
        ``parameters``; ``flops_forward`` and ``flops_step`` of the whole network, what is done again in backward
        included; ``flops_model``, without it; ``flops_optimizer`` of the matrix products in an optimizer step;
        ``parameter_bytes``, ``gradient_bytes`` and ``optimizer_state_bytes``; ``counted_peak_bytes``, the most that is
        alive during a step, what an operation needs inside itself left out.
        Of this package's networks also ``layers``, the FLOPs of the decoder layers alone;
        ``saved_bytes_per_token_per_layer``, what one more layer keeps between forward and backward, its input included;
        and ``saved_hidden_states_per_layer``, the same in bf16 hidden states (2 D bytes).
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
        sizes = {"parameter_bytes": parameters, "gradient_bytes": gradients, "optimizer_state_bytes": states}
        result |= {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in sizes.items()}
        del gradients
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
    # What the last layer hands on is the next one's input: each layer is charged with one.
    more, fewer = (kept_bytes(lambda n=n: first(n), known) for n in (len(layers), len(layers) - 1))
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
