"""Next-token losses of a batch."""

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import pad

from cola_lightning.data.packing import IGNORE


def next_token_losses(
    network: nn.Module, batch: dict[str, Tensor], reduction: Literal["none", "sum"] = "none"
) -> tuple[Tensor, Tensor]:
    """Compute next-token losses in nats.

    Position t predicts the token at t + 1. The last position of a row predicts nothing, so it is always ignored.

    Args:
        network: Maps ids (B, T), document ids (B, T) or None, and targets (B, T) to losses.
        batch: ``input_ids`` and ``labels`` (B, T), and ``document_ids`` (B, T) where documents are masked.
        reduction: ``none`` for a loss at each position, ``sum`` for their sum.

    Returns:
        The losses (B, T), zero where ignored, or their sum; and a mask (B, T) of the positions that are not ignored.
    """
    targets = pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    losses = network(batch["input_ids"], batch.get("document_ids"), targets=targets, reduction=reduction)
    return losses, targets != IGNORE
