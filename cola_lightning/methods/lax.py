"""LaX, latent crossing (arXiv 2505.21732), on CoLA: a projection adds the latent of its counterpart one layer before.

``h_l = silu(LayerNorm(A x + gate(h_{l-1})))``, ``y = B h_l``, and ``h_l`` passes on to the next layer. The first layer
has neither gate nor norm: ``h_0 = silu(A x)``, which is CoLA. This is what the authors' code computes
(K1seki221/Latent_Crossing c892d2c, for vision transformers; the code of their language models is not public). The
factors are initialized as CoLA's, because the authors' language models build on CoLA.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from cola_lightning.methods.arguments import check_choice
from cola_lightning.methods.cola import CoLA
from cola_lightning.models.projection import CrossLayer, Projection


class LaX(CoLA, CrossLayer):
    """``B silu(LayerNorm(A x + gate(h)))``, where ``h`` (…, R) is the activated latent of the layer before.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the bottleneck, between 1 and the smaller side.
        gate: ``kronecker`` multiplies ``h`` by the Kronecker product of two small trained matrices, see
            :class:`KroneckerGate`. ``identity`` adds ``h`` as it is.

    Raises:
        InputError: If the rank is out of range, or the gate is neither.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, gate: Literal["kronecker", "identity"] = "kronecker"
    ) -> None:
        super().__init__(in_features, out_features, rank)
        check_choice("LaX", "gate", gate, "kronecker", "identity")
        self.gate = gate
        self.latent_gate = KroneckerGate(rank) if gate == "kronecker" else nn.Identity()
        self.latent_norm = nn.LayerNorm(rank, eps=1e-6)

    def forward(self, x: Tensor, received: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        z = self.latent(x)
        if received is not None:
            # Autocast computes the norm in float32. Cast back, because h is kept for the backward pass.
            z = self.latent_norm(z + self.latent_gate(received)).to(z.dtype)
        h = silu(z)
        return self.B(h), h

    def in_first_layer(self) -> Projection:
        del self.latent_gate, self.latent_norm
        return self


class KroneckerGate(nn.Module):
    """Multiply a latent by the Kronecker product ``right ⊗ left``, an R x R matrix of a² + b² numbers.

    R = b a, with b and a as near to each other as possible: at R = 256 two matrices of 16 x 16, at R = 8 one of 2 x 2
    and one of 4 x 4. Both are initialized Kaiming-uniform, U(±√(6 / side)), as in the authors' code.

    Args:
        rank: Size R of the last dimension of input and output.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        b = max(divisor for divisor in range(1, int(rank**0.5) + 1) if rank % divisor == 0)
        self.left = nn.Parameter(torch.empty(rank // b, rank // b))
        self.right = nn.Parameter(torch.empty(b, b))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Draw from a generator of its own and leave the global one unchanged. The first layer drops its gate, so a
        # network that is built whole would otherwise draw other weights than one that is filled module by module.
        device = self.left.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), device="cpu" if device.type == "meta" else device)))
            nn.init.kaiming_uniform_(self.left)
            nn.init.kaiming_uniform_(self.right)

    def forward(self, h: Tensor) -> Tensor:
        # View the latent as b rows of a numbers. left acts within each row, right mixes the rows.
        rows = h.unflatten(-1, (len(self.right), len(self.left)))
        return (self.right.T @ (rows @ self.left)).flatten(-2)
