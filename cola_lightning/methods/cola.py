"""CoLA, low-rank activation (arXiv 2502.10940): ``h = B σ(A x)`` with σ = SiLU on the R-wide latent.

Nothing is frozen, merged or reset. Both factors train from the first step, with any optimizer.
"""

from torch import Tensor
from torch.nn.functional import silu

from cola_lightning.methods.low_rank import LowRank


class CoLA(LowRank):
    """``B silu(A x)`` in place of a dense matrix; arguments, initialization and errors are those of LowRank."""

    @staticmethod
    def activate(z: Tensor) -> Tensor:
        """Apply σ."""
        return silu(z)

    def dense(self) -> None:
        """Return None, because the nonlinearity between the factors makes the map nonlinear."""
        return None
