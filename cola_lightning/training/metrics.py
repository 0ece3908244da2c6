"""Loss and perplexity per token, and the perplexity of the published tables."""

import torch
from torch import Tensor

from cola_lightning.private_apis.torchmetrics import ExactMetric


class _Sums(ExactMetric):
    """A metric with sums in float64 under any precision. Sums in bf16 would stop growing."""

    def reset(self) -> None:
        # Trainer.validate resets in inference mode, and a later validation within fit is not in inference mode: it
        # could not add to an inference tensor in place.
        with torch.inference_mode(False):
            super().reset()


class TokenLoss(_Sums):
    """Mean loss in nats per predicted token, over all batches and ranks."""

    loss_sum: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, tokens: Tensor) -> None:
        """Add a batch: the sum of its losses in nats, and how many tokens were predicted."""
        self.loss_sum += loss_sum
        self.tokens += tokens

    def compute(self) -> Tensor:
        return self.loss_sum / self.tokens


class Perplexity(TokenLoss):
    """Perplexity: exp of the mean loss per predicted token."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class PublishedPerplexity(_Sums):
    """Perplexity as ReLoRA, GaLore, SLTrain, Fira, APOLLO and CoLA print it, for comparison with their tables only.

    Their evaluation averages the mean losses of batches, which may hold different numbers of tokens, and divides by one
    batch too many on each rank, because its counter starts at 1. So the value is too low, and depends on the
    micro-batch and on the number of ranks.
    """

    mean_sum: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("batches", torch.ones((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, tokens: Tensor) -> None:
        """Add a batch, as for :class:`TokenLoss`; a batch without tokens to predict is left out."""
        self.mean_sum += loss_sum / tokens.clamp(min=1)
        self.batches += tokens > 0

    def compute(self) -> Tensor:
        return (self.mean_sum / self.batches).exp()
