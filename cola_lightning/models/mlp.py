"""The gated MLP of a decoder layer."""

from torch import Tensor, nn
from torch.nn.functional import silu

from cola_lightning.models.config import LlamaConfig
from cola_lightning.models.projection import MakeProjection


class MLP(nn.Module):
    """Gated MLP ``down(silu(gate(x)) * up(x))``; (B, T, D) -> (B, T, D).

    With ``gate_silu: false`` the SiLU is left out, because the projections bring their own nonlinearity (CoLA from 350M
    up, see :class:`~cola_lightning.models.LlamaConfig`).
    """

    def __init__(self, config: LlamaConfig, projection: MakeProjection) -> None:
        super().__init__()
        self.gate_silu = config.gate_silu
        self.gate_proj = projection(config.hidden_size, config.intermediate_size)
        self.up_proj = projection(config.hidden_size, config.intermediate_size)
        self.down_proj = projection(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.combine(self.gate_proj(x), self.up_proj(x)))

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply by the gate; all (B, T, F)."""
        return (silu(gate) if self.gate_silu else gate) * up
