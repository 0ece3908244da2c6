"""LaX-LLaMA for ``transformers`` (LaX, arXiv 2505.21732).

Every projection adds the latent of the same projection in the layer before:
``h_l = silu(LayerNorm(A x + gate(h_{l-1})))``, ``y = B h_l``. In the first layer ``h_0 = silu(A x)``.

This file needs nothing else but transformers. It is in the folder of a model, and is loaded by

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

All other parts, such as attention, the KV cache and generation, are LLaMA's own.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM


class LaXLlamaConfig(LlamaConfig):
    """LLaMA's configuration with further arguments for the projections.

    Args:
        rank: Width of the bottleneck (R).
        gate: Map that is applied to the latent of the layer before: ``kronecker``, the Kronecker product of two
            trained matrices, or ``identity``.

    LLaMA's ``hidden_act`` is ``silu`` with the SiLU on the MLP's gate, and ``linear`` without it. CoLA leaves it out
    from 350M up.
    """

    model_type = "lax_llama"
    base_model_tp_plan = None  # type: ignore[assignment]  # LLaMA's plan for tensor parallelism does not fit

    rank: int = 128
    gate: str = "kronecker"


class KroneckerGate(nn.Module):
    """The Kronecker gate, (…, R) -> (…, R).

    A latent is taken as b rows of a numbers, with R = b a. It is multiplied by ``left`` (a, a) within rows and by
    ``right`` (b, b) across rows.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        rows = max(divisor for divisor in range(1, int(rank**0.5) + 1) if rank % divisor == 0)
        self.left = nn.Parameter(torch.empty(rank // rows, rank // rows))
        self.right = nn.Parameter(torch.empty(rows, rows))
        nn.init.kaiming_uniform_(self.left)
        nn.init.kaiming_uniform_(self.right)

    def forward(self, h: Tensor) -> Tensor:
        rows = h.unflatten(-1, (len(self.right), len(self.left)))
        return (self.right.T @ (rows @ self.left)).flatten(-2)


class LatentLinear(nn.Module):
    """``B silu(LayerNorm(A x + gate(h)))``, (…, in) -> (…, out), without norm and gate in the first layer.

    h is the latent of the same projection in the layer before, for the same tokens. The module keeps its own latent
    for the next layer.
    """

    latent: Tensor | None = None

    def __init__(
        self, in_features: int, out_features: int, rank: int, gate: str, before: "LatentLinear | None" = None
    ) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)
        self.before = (before,)  # in a tuple, so that it is not registered as a submodule
        if before is not None:
            self.latent_gate = KroneckerGate(rank) if gate == "kronecker" else nn.Identity()
            self.latent_norm = nn.LayerNorm(rank, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.A(x)
        before = self.before[0]
        if before is not None:
            assert before.latent is not None, "the layer before has not run"
            z = self.latent_norm(z + self.latent_gate(before.latent.to(z.device))).to(z.dtype)
        self.latent = silu(z)
        return self.B(self.latent)


def forget(model: nn.Module, *_) -> None:
    """Drop the latents after a forward pass."""
    for module in model.modules():
        if isinstance(module, LatentLinear):
            module.latent = None


class LaXLlamaForCausalLM(LlamaForCausalLM):
    """LLaMA with LaX's projections."""

    config_class = LaXLlamaConfig
    supports_gradient_checkpointing = False  # a layer that runs again would not find the latents

    def __init__(self, config: LaXLlamaConfig) -> None:
        super().__init__(config)
        before: dict[str, LatentLinear] = {}
        for layer in self.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, dense in list(part.named_children()):
                    if isinstance(dense, nn.Linear):
                        sizes = dense.in_features, dense.out_features
                        before[name] = LatentLinear(*sizes, config.rank, config.gate, before.get(name))
                        setattr(part, name, before[name])
        self.model.register_forward_hook(forget)
        self.post_init()
