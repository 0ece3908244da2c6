"""Three optimizer steps over ten rows of unequal length, the last of them over two rows; gradients are written down."""

import os
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from cola_lightning.methods import CoLA
from cola_lightning.training.module import LanguageModel

LENGTHS = [9, 2, 3, 1, 16, 4, 8, 2, 5, 12]  # learnt tokens, and one more: the row of length 1 has nothing to learn
STEPS = [range(4), range(4, 8), range(8, 10)]


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 40, (len(LENGTHS), 16), generator=generator)
    labels = ids.where(torch.arange(16) < torch.tensor(LENGTHS)[:, None], -100)
    return [{"input_ids": ids[row], "labels": labels[row]} for row in range(len(LENGTHS))]


class Seeded(LanguageModel):
    def configure_model(self):
        torch.manual_seed(5)
        super().configure_model()


def model(**options) -> LanguageModel:
    # Nothing moves, so the gradients of all steps are those of the same weights.
    optimizer = partial(torch.optim.SGD, lr=0.0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "projection": partial(CoLA, rank=4), "optimizer": optimizer}
    return Seeded(**(sizes | options))


def flat(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def gradients(ranks: int, out: str, batch_size: int, **options) -> None:
    """Write the gradients of each step, as they are before clipping, to OUT/RANK.pt."""
    seen: list[torch.Tensor] = []
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=1, max_steps=3,
        accumulate_grad_batches=4 // (batch_size * ranks), precision="64-true", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    lm = model(**options)
    lm.before_update.append(lambda module, optimizer, norm: seen.append(flat(module.network)))
    trainer.fit(lm, DataLoader(rows()[int(os.environ.get("RANK", 0)) :: ranks], batch_size=batch_size))
    torch.save(torch.stack(seen), Path(out, f"{trainer.global_rank}.pt"))


def expected_gradients(micro_batch: int | None = None) -> torch.Tensor:
    """Return the gradients of each step by torch's own mean over all its learnt tokens.

    With ``micro_batch`` rows they are those of the mean of such means over the micro-batches.
    """
    lm = model()
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        try:
            lm.configure_model()
        finally:
            torch.set_default_dtype(torch.float32)
    found = []
    for step in STEPS:
        lm.network.zero_grad()
        batch = {name: torch.stack([rows()[row][name] for row in step]) for name in ("input_ids", "labels")}
        losses = []
        for part in range(0, len(step), micro_batch or len(step)):
            ids, labels = (batch[name][part : part + (micro_batch or len(step))] for name in ("input_ids", "labels"))
            logits = lm.network(ids)[:, :-1].flatten(0, 1)
            losses.append(cross_entropy(logits, labels[:, 1:].flatten()))
        torch.stack(losses).mean().backward()
        found.append(flat(lm.network))
    return torch.stack(found)
