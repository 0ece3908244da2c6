"""CoLA: low-rank activation (arXiv 2502.10940), ``h = B σ(A x)`` with σ = SiLU on the R-wide latent.

Nothing is frozen, merged or reset: both factors train under any optimizer from the first step.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from cola_lightning.methods.low_rank import LowRank


class CoLA(LowRank):
    """``B silu(A x)`` in place of a dense in x out matrix; arguments, initialisation and errors as in LowRank."""

    def expand(self, z: Tensor) -> Tensor:
        return self.B(silu(z))

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> None:
        """Begin near a dense matrix: with ``B A`` at twice its best approximation of rank R.

        ``silu(z) = z / 2 + z tanh(z / 2) / 2``, whose second term is even. Where z is spread evenly around zero, half
        of z is therefore the linear map that silu is nearest to, and twice the product gives the linear part back.
        """
        super().approximate(2 * weight)

    def dense(self) -> None:
        """None: there is no such matrix, for the map is not linear."""
        return None
