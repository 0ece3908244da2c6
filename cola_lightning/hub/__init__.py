"""Export models as folders that ``transformers``, and programs that build on it, can load."""

from cola_lightning.hub.folder import write_folder

__all__ = ["write_folder"]
