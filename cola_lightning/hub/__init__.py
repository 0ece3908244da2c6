"""Out of the house: folders that ``transformers`` and all that builds on it can load."""

from cola_lightning.hub.folder import write_folder

__all__ = ["write_folder"]
