"""LaX, latent crossing (arXiv 2505.21732), on CoLA: a projection's latent is added to that of the next layer's."""

from torch import Tensor
from torch.nn.functional import silu

from cola_lightning.methods.cola import CoLA
from cola_lightning.models.layers import CrossLayer, Projection, Scalar


class LaX(CoLA, CrossLayer):
    """``B (h_l + g h_{l-1})`` with ``h = silu(A x)``, the latent of the same projection in the layer before being
    ``h_{l-1}``; CoLA itself in the first layer.

    What is added is the latent as B takes it, after the nonlinearity, and each layer hands on its own alone; the
    paper's text was not at hand for either. The latent is handed on before the nonlinearity, so that a checkpointing
    policy that keeps it anyway keeps it once.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the bottleneck, between 1 and the smaller side.
        gate: Where g starts, a learned number for each projection and layer; null for a plain sum. Both are our choice.

    Raises:
        InputError: If the rank is out of range.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, gate: float | None = None) -> None:
        super().__init__(in_features, out_features, rank)
        self.gate = None if gate is None else Scalar(gate)

    def forward(self, x: Tensor, received: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        z = self.latent(x)
        h = silu(z)
        if received is not None:
            h = h + (silu(received) if self.gate is None else self.gate.weight * silu(received))
        return self.B(h), z

    def in_first_layer(self) -> Projection:
        self.gate = None
        return self
