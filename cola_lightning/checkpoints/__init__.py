"""Read, check and write the checkpoints of every strategy, and read folders that other programs wrote."""

from cola_lightning.checkpoints.allowed_classes import check_named_code
from cola_lightning.checkpoints.formats import Checkpoint, read, read_state
from cola_lightning.checkpoints.manifest import find_corruption
from cola_lightning.checkpoints.pretrained import load_model
from cola_lightning.checkpoints.safe_unpickle import check_no_code, plain_data_only
from cola_lightning.checkpoints.sizes import check_sizes, model_settings

__all__ = [
    "Checkpoint",
    "check_named_code",
    "check_no_code",
    "check_sizes",
    "find_corruption",
    "load_model",
    "model_settings",
    "plain_data_only",
    "read",
    "read_state",
]
