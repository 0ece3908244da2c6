"""In and out: the checkpoints of every strategy, and folders that others wrote."""

from cola_lightning.checkpoints.folders import load_model
from cola_lightning.checkpoints.formats import Checkpoint, read, read_state
from cola_lightning.checkpoints.integrity import damage
from cola_lightning.checkpoints.named_code import check_named_code
from cola_lightning.checkpoints.sizes import check_sizes, model_settings
from cola_lightning.checkpoints.trust import plain_data_only, refuse_code

__all__ = [
    "Checkpoint",
    "check_named_code",
    "check_sizes",
    "damage",
    "load_model",
    "model_settings",
    "plain_data_only",
    "read",
    "read_state",
    "refuse_code",
]
