"""CoLA: low-rank activation (arXiv 2502.10940), ``h = B σ(A x)`` with σ = SiLU on the R-wide latent.

Nothing is frozen, merged or reset: both factors train under any optimizer from the first step.
"""

from torch import Tensor
from torch.nn.functional import silu

from cola_lightning.methods.low_rank import LowRank


class CoLA(LowRank):
    """``B silu(A x)`` in place of a dense in x out matrix; arguments, initialization and errors as in LowRank."""

    @staticmethod
    def activate(z: Tensor) -> Tensor:
        """σ."""
        return silu(z)

    def dense(self) -> None:
        """None: the nonlinearity stands between the factors."""
        return None
