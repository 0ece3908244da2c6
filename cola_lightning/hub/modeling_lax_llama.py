"""LaX-LLaMA for ``transformers`` (LaX, arXiv 2505.21732).

Every projection adds the latent of the same projection in the layer before,
``h_l = silu(LayerNorm(A x + gate(h_{l-1})))``, ``y = B h_l``; in the first layer ``h_0 = silu(A x)``.

This file stands alone. It lies in the folder of a model, from where it is loaded by

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Everything else, attention, the key-value cache and generation included, is LLaMA's own.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM


class LaXLlamaConfig(LlamaConfig):
    """LLaMA's configuration, and of the projections:

    Args:
        rank: Width of the bottleneck (R).
        gate: What the latent of the layer before goes through: ``kronecker``, the Kronecker product of two trained
            matrices, or ``identity``.

    The SiLU on the MLP's gate, which CoLA leaves out from 350M up, is LLaMA's ``hidden_act``: ``silu`` with it,
    ``linear`` without.
    """

    model_type = "lax_llama"
    base_model_tp_plan = None

    rank: int = 128
    gate: str = "kronecker"


class KroneckerGate(nn.Module):
    """Multiply a latent, as b rows of a numbers with R = b a, by ``left`` within rows and by ``right`` across them."""

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
    """``B silu(LayerNorm(A x + gate(h)))``, h the latent of the same projection in the layer before, for the same
    tokens; without norm and gate in the first layer. It remembers its own latent, for the next layer to take."""

    latent: Tensor | None = None

    def __init__(
        self, in_features: int, out_features: int, rank: int, gate: str, before: "LatentLinear | None" = None
    ) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)
        self.before = (before,)  # in a tuple, so that it is not taken for a part of this module
        if before is not None:
            self.latent_gate = KroneckerGate(rank) if gate == "kronecker" else nn.Identity()
            self.latent_norm = nn.LayerNorm(rank, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.A(x)
        if self.before[0] is not None:
            z = self.latent_norm(z + self.latent_gate(self.before[0].latent.to(z.device))).to(z.dtype)
        self.latent = silu(z)
        return self.B(self.latent)


def forget(model: nn.Module, *_) -> None:
    """Let go of the latents when a forward pass is over."""
    for module in model.modules():
        if isinstance(module, LatentLinear):
            module.latent = None


class LaXLlamaForCausalLM(LlamaForCausalLM):
    config_class = LaXLlamaConfig
    supports_gradient_checkpointing = False  # a layer that is run again would find the latents of another gone

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
