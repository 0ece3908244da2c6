"""Loss and perplexity, once right and once as the published tables have it."""

import torch
from torch import Tensor

from cola_lightning.private_apis import ExactMetric


class _Sums(ExactMetric):
    """Sums that stay in float64 under any precision, because in bf16 they would stop growing."""

    def reset(self) -> None:
        # Trainer.validate runs in inference mode, but the validations of a fit after it do not; they could not add to
        # an inference tensor.
        with torch.inference_mode(False):
            super().reset()


class TokenLoss(_Sums):
    """Mean loss in nats per predicted token, over all batches and ranks; sums are kept in float64."""

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
    """exp of the mean loss per predicted token."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class PublishedPerplexity(_Sums):
    """Perplexity as ReLoRA, GaLore, SLTrain, Fira, APOLLO and CoLA print it; for comparison with their tables only.

    Their evaluation averages the mean losses of batches, however many tokens each holds, and divides by one batch too
    many (a counter that starts at 1), separately on each rank. The value is therefore too low, and depends on the
    micro-batch and on the number of ranks.
    """

    mean_sum: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("batches", torch.ones((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, tokens: Tensor) -> None:
        """Add a batch, as for :class:`TokenLoss`; one without tokens to predict counts for nothing."""
        self.mean_sum += loss_sum / tokens.clamp(min=1)
        self.batches += tokens > 0

    def compute(self) -> Tensor:
        return (self.mean_sum / self.batches).exp()
