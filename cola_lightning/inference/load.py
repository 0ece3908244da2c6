"""Load a trained model: from a checkpoint of any strategy, the directory of a run, or a Hugging Face folder."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from cola_lightning.checkpoints import Checkpoint, check_named_code, check_no_code, find_corruption, load_model, read
from cola_lightning.checkpoints.formats import format_of
from cola_lightning.checkpoints.pretrained import check_finite, check_shapes
from cola_lightning.checkpoints.sizes import compare_sizes
from cola_lightning.data.folder_tokenizer import FolderTokenizer
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.models import Llama
from cola_lightning.provenance import TOKENIZER
from cola_lightning.training.module import LanguageModel

NOT_BUILT = {"optimizer", "schedule", "compile", "initial_weights"}
"""Arguments of the LightningModule that its network does not depend on."""


@dataclass
class LoadedModel:
    """A network, with the facts of its checkpoint and its run.

    Args:
        network: In eval mode, on the CPU, in the dtype in which it was stored.
        path: The checkpoint or folder.
        checkpoint: Content of the checkpoint; None for a folder in Hugging Face's layout.
        run_dir: Directory of the run that the checkpoint is in; None if there is none.
    """

    network: Llama
    path: Path
    checkpoint: Checkpoint | None = None
    run_dir: Path | None = None

    def tokenizer(self, name: str | None = None) -> Tokenizer:
        """Load the tokenizer of the run or folder, or another one by name.

        A run's tokenizer is used as in training. That of a folder in Hugging Face's layout is used as transformers uses
        it: it puts ids before a text, and reads special tokens in it. Another one for such a folder is used in the same
        way if it puts ids before a text.

        Args:
            name: Folder, tokenizer.json or repository on the hub; None for the model's own.

        Raises:
            InputError: If no name is given, and the model's own is not known.
        """
        if name is not None:
            if self.checkpoint is None and (foreign := FolderTokenizer.open(name)).prefix:
                return foreign
            return Tokenizer.load(name)
        if self.checkpoint is None and (self.path / "tokenizer.json").is_file():
            return FolderTokenizer.open(str(self.path))
        for folder in (self.path, self.run_dir / TOKENIZER if self.run_dir else self.path):
            if (folder / "tokenizer.json").is_file():
                return Tokenizer.load(str(folder))
        named = self._data_arguments().get("tokenizer")
        if named and isinstance(named, str):
            return Tokenizer.load(named)
        raise InputError(f"{self.path} does not say which tokenizer it was trained with; name it by --tokenizer")

    def sequence_length(self) -> int | None:
        """Return the tokens of a training row (T); None if that is not known."""
        length = self._data_arguments().get("sequence_length")
        return length if type(length) is int and length > 0 else None

    def _data_arguments(self) -> dict[str, Any]:
        """Return the arguments of the data module. It may be a user's own, with arguments of any kind."""
        arguments = (self.configuration().get("data") or {}).get("init_args")
        return arguments if isinstance(arguments, dict) else {}

    def configuration(self) -> dict[str, Any]:
        """Read the configuration of the run; empty if there is no run.

        Raises:
            InputError: If its file cannot be read.
        """
        file = self.run_dir / "config.yaml" if self.run_dir else None
        if file is None:
            return {}
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise InputError(
                f"{file} cannot be read: {error}; write it anew, or name the checkpoint elsewhere"
            ) from error
        data = content.get("data") if isinstance(content, dict) else None
        if not isinstance(content, dict) or not isinstance((data or {}), dict):
            raise InputError(f"{file} is not the configuration of a run; mend it, or copy the checkpoint elsewhere")
        return content


def load_model_for_inference(path: str | Path, trusted: Collection[str] = ()) -> LoadedModel:
    """Load a checkpoint of any strategy, the last checkpoint of a run's directory, or a Hugging Face folder.

    No code in the file runs.

    Args:
        path: The checkpoint, directory or folder.
        trusted: Classes or packages whose code a checkpoint may name, in addition to this package's.

    Raises:
        InputError: If the path is none of these, its checksums do not match, or it names code of others.
        UnusableModelError: If its weights hold NaN or infinity.
    """
    path = Path(path).expanduser()
    if (path / "config.json").is_file():
        network = load_model(path)
        check_finite(network.state_dict(), path)
        return LoadedModel(network, path)
    last = path / "checkpoints" / "last.ckpt"
    path = last if last.exists() else path
    format_of(path)  # refuses what is not a checkpoint
    check_no_code(path)
    if problem := find_corruption(path):
        raise InputError(f"{path} is damaged: {problem}; name another checkpoint")
    checkpoint = read(path)
    check_finite(checkpoint.weights, path)
    run_dir = next((parent for parent in path.absolute().parents[:2] if (parent / "config.yaml").is_file()), None)
    return LoadedModel(build(checkpoint, path, trusted), path, checkpoint, run_dir)


def pick_device(name: str | None) -> torch.device:
    """Return the device with this name; without a name, a GPU if there is one, else the CPU.

    Raises:
        InputError: If there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def build(checkpoint: Checkpoint, path: Path, trusted: Collection[str] = ()) -> Llama:
    """Build the network that a checkpoint's hyper-parameters describe, with its weights, in eval mode.

    Raises:
        InputError: If the hyper-parameters describe no network, or one that the weights do not fit.
    """
    parser = ArgumentParser(exit_on_error=False)
    known = parser.add_class_arguments(LanguageModel, "model", skip=NOT_BUILT)
    stored = checkpoint.hyper_parameters
    names = {name.removeprefix("model.").split(".")[0] for name in known}
    shapes = {name: tuple(weight.shape) for name, weight in checkpoint.weights.items()}
    compare_sizes(stored, shapes, path)
    chosen = {name: stored[name] for name in names if name in stored}
    settings = {"model": check_named_code(chosen, LanguageModel, path, trusted)}
    try:
        module = parser.instantiate(parser.parse_object(settings)).model
    except ArgumentError as error:
        raise InputError(f"{path} describes a model that cannot be built: {' '.join(str(error).split())}") from error
    with torch.device("meta"):
        network = module.build()
    hint = "" if "projection" in stored else ", and does not name its projections, as a run from Python leaves them out"
    check_shapes(network, checkpoint.weights, f"{path} holds other weights than its hyper-parameters describe{hint}")
    network.load_state_dict(checkpoint.weights, assign=True)
    return network.eval()
