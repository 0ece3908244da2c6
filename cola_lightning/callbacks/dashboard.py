"""The page "Custom Scalars" of TensorBoard."""

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

LAYOUT = {
    "Learning": {
        "loss": ["Multiline", ["train/loss"]],
        "validation perplexity": ["Multiline", [r"val/perplexity.*"]],
        "learning rate": ["Multiline", ["train/learning_rate"]],
    },
    "Speed": {
        "tokens per second": ["Multiline", ["train/tokens_per_second"]],
        "share of the peak (MFU, HFU)": ["Multiline", ["train/mfu", "train/hfu"]],
        "share of the time spent waiting for data": ["Multiline", ["train/data_wait"]],
    },
    "Health": {
        "gradient norm before clipping, whole and by group": ["Multiline", [r"(train/)?gradient_norm(/.*)?"]],
        "memory in GiB": ["Multiline", [r"memory/.*"]],
        "skipped steps and rollbacks": ["Multiline", [r"guard/.*"]],
    },
    "Effective rank, a line a layer": {
        "into attention": ["Multiline", [r"effective_rank/self_attn\.q_proj\.input/.*"]],
        "out of attention": ["Multiline", [r"effective_rank/self_attn\.o_proj\.output/.*"]],
        "out of attention, latent": ["Multiline", [r"effective_rank/self_attn\.o_proj\.latent/.*"]],
        "into the MLP": ["Multiline", [r"effective_rank/mlp\.gate_proj\.input/.*"]],
        "out of the MLP": ["Multiline", [r"effective_rank/mlp\.down_proj\.output/.*"]],
        "out of the MLP, latent": ["Multiline", [r"effective_rank/mlp\.down_proj\.latent/.*"]],
    },
}
"""Charts by category; for each chart the tags that it shows, as regular expressions."""


class Dashboard(L.Callback):
    """Define the page "Custom Scalars" of TensorBoard: learning, speed, health and effective ranks on one page.

    It is written once, when the run starts. Charts of callbacks that the run does not have stay empty.
    """

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(LAYOUT)
