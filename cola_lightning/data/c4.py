"""The data module for C4, the corpus of the papers."""

from typing import Any

from cola_lightning.data.sources import DataFiles
from cola_lightning.data.streaming import StreamingDataModule


class C4DataModule(StreamingDataModule):
    """Streams C4. It is :class:`StreamingDataModule` with C4's defaults, and shares its state in checkpoints.

    Args:
        path: Data set on the Hugging Face hub; another source is read as :class:`StreamingDataModule` reads it.
        name: Configuration of the data set; if not given, ``en`` for allenai/c4, and none for another data set.
        data_files: Files, patterns or addresses, by split.
        kwargs: Arguments of :class:`StreamingDataModule`.
    """

    def __init__(
        self, path: str = "allenai/c4", name: str | None = None, data_files: DataFiles = None, **kwargs: Any
    ) -> None:
        if path == "allenai/c4" and name is None and data_files is None:
            name = "en"
        super().__init__(path=path, name=name, data_files=data_files, **kwargs)
