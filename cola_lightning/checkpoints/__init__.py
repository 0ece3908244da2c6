"""In and out: the checkpoints of every strategy, and folders that others wrote."""

from cola_lightning.checkpoints.folders import load_model
from cola_lightning.checkpoints.formats import Checkpoint, read, read_state
from cola_lightning.checkpoints.integrity import damage
from cola_lightning.checkpoints.trust import refuse_code

__all__ = ["Checkpoint", "damage", "load_model", "read", "read_state", "refuse_code"]
