"""Find the files of a tokenizer in a folder or on the Hugging Face hub, and read its settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from cola_lightning.data.retry import Retry
from cola_lightning.errors import InputError
from cola_lightning.stored_data import read_json

TOKENIZER = "tokenizer.json"
LARGEST = 2**28
"""Largest size of each file, in bytes. The largest tokenizer.json in use has about 35 million."""

FindFile = Callable[[str], Path | None]
"""``f(name)`` returns the path of the file of that name, or None if the tokenizer does not have it."""


def find_tokenizer_files(name: str, retry: Retry) -> FindFile:
    """Return a function that finds the files of a tokenizer by name. It always finds tokenizer.json.

    Args:
        name: Folder, tokenizer.json, or repository on the hub.
        retry: Retries downloads that fail.

    Raises:
        InputError: If there is no tokenizer.json, or the repository is gated, private or does not exist.
    """
    local = Path(name).expanduser()
    if not local.exists():
        return _HubFiles(name, retry)
    file = tokenizer_file(name)
    beside = file.parent  # the file itself may have any name
    return lambda other: file if other == TOKENIZER else beside / other if (beside / other).is_file() else None


def tokenizer_file(name: str) -> Path:
    """Return the path of the tokenizer.json.

    Args:
        name: The file itself, or its folder.

    Raises:
        InputError: If there is no such file.
    """
    path = Path(name).expanduser()
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"{path} holds no tokenizer.json; name a folder that does, the file itself, or a hub repository"
        )
    return file


def read_settings(find: FindFile) -> dict[str, Any]:
    """Merge the settings files as transformers does.

    special_tokens_map.json takes precedence, unless tokenizer_config.json has ``added_tokens_decoder``, a key of newer
    files.

    Raises:
        InputError: If a file is not a JSON object.
    """
    settings, special = (read_object(find(name)) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    return special | settings if "added_tokens_decoder" in settings else settings | special


def token_content(settings: dict[str, Any], key: str) -> str | None:
    """Look up the text of a special token in the settings; None if there is none.

    The value is the text itself, or an object with the text under ``content``.

    Raises:
        InputError: If it is neither.
    """
    value = settings.get(key)
    content = value.get("content") if isinstance(value, dict) else value
    if content is not None and not isinstance(content, str):
        raise InputError(f"a tokenizer's {key} is {content!r}; it must be the text of a token")
    return content


def read_object(file: Path | None) -> dict[str, Any]:
    """Read the JSON object in a file of a tokenizer or of the model beside it; empty if there is no file.

    Raises:
        InputError: If the file is too large, or is not a JSON object.
    """
    if file is None:
        return {}
    check_file_size(file)
    return read_json(file)


def check_file_size(file: Path) -> None:
    """Check, before a file is read, that it is not too large to be part of a tokenizer.

    Raises:
        InputError: If it is larger than ``LARGEST``.
    """
    if file.is_file() and (size := file.stat().st_size) > LARGEST:
        raise InputError(f"{file} has {size:,} bytes; a file of a tokenizer has {LARGEST:,} at most")


class _HubFiles:
    """Downloads the files of one commit of a repository, unless they are in the hub's cache."""

    def __init__(self, name: str, retry: Retry) -> None:
        self.name, self.retry = name, retry
        file = self._call(TOKENIZER, revision=None)
        if file is None:
            raise InputError(
                f"{name} on the Hugging Face hub has no tokenizer.json; name another, or write one there by "
                f"transformers: AutoTokenizer.from_pretrained({name!r}).save_pretrained(FOLDER)"
            )
        self.file = file
        self.commit = file.parent.name  # the cache is laid out as snapshots/COMMIT/FILE

    def __call__(self, file: str) -> Path | None:
        return self.file if file == TOKENIZER else self._call(file, self.commit)

    def _call(self, file: str, revision: str | None) -> Path | None:
        name, server = f"tokenizer {self.name} ({file})", huggingface_hub.constants.ENDPOINT
        return self.retry.call(lambda: self._download(file, revision), name, server)

    def _download(self, file: str, revision: str | None) -> Path | None:
        try:
            return Path(hf_hub_download(self.name, file, revision=revision))
        except LocalEntryNotFoundError as error:
            cause = error.__cause__
            if cause is not None and not isinstance(cause, OfflineModeIsEnabled):
                raise cause from None  # the failed request itself, because Retry decides by its type and status
            if revision:  # offline, tokenizer.json is in the cache, and this file is not
                return None
            raise InputError(
                f"tokenizer {self.name!r} is neither a folder here nor in the Hugging Face cache, and HF_HUB_OFFLINE "
                f"is set; unset it, or name a folder with a tokenizer.json"
            ) from error
        except EntryNotFoundError:
            return None
        except GatedRepoError as error:
            raise InputError(
                f"tokenizer {self.name!r} is gated: ask for access on its page of the Hugging Face hub, then log in "
                f"with 'hf auth login' or set HF_TOKEN"
            ) from error
        except RepositoryNotFoundError as error:
            raise InputError(
                f"tokenizer {self.name!r} is neither a folder here nor a repository on the Hugging Face hub that you "
                f"may read; name a folder with a tokenizer.json, or log in with 'hf auth login' if it is private"
            ) from error
        except HFValidationError as error:
            raise InputError(
                f"tokenizer {self.name!r} is neither a folder or file here nor the name of a repository on the "
                f"Hugging Face hub; name a folder with a tokenizer.json"
            ) from error
