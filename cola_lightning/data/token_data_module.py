"""The base of the data modules: validation loaders, identity of a run's data, and choice of its tokenizer."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset
from typing_extensions import TypedDict

from cola_lightning.data.identity import Identity, StoredIdentity, StoredTokenizer, compare_runs, content_of
from cola_lightning.data.packing import RowShape
from cola_lightning.data.row_loader import EvalLoader
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.distributed.ranks import tell_all
from cola_lightning.errors import InputError, check_at_least, hide_secrets
from cola_lightning.host_memory import check_batch, check_workers
from cola_lightning.private_apis.lightning import unwrap_data_loaders
from cola_lightning.stored_data import ALTERED, check_stored

IDENTITY = "identity"
"""Key of the identity of the run's data in the state of every data module."""


class StoredState(TypedDict):
    """State of a data module in a checkpoint. A subclass adds its position."""

    identity: StoredIdentity


class _OtherIdentity(TypedDict):
    tokenizer: StoredTokenizer


def resolve_global_batch_size(rows: int | None, tokens: int | None, sequence_length: int) -> int | None:
    """Return the rows of an optimizer step, given in rows or in tokens; None if neither is given.

    Raises:
        InputError: If both are given, or the tokens are not a multiple of ``sequence_length``.
    """
    if tokens is None:
        return rows
    if rows is not None:
        raise InputError(
            f"--data.global_batch_size {rows} and --data.global_batch_tokens {tokens} both state the batch; set one of "
            f"them to null"
        )
    whole, left = divmod(tokens, sequence_length)
    if left or whole < 1:
        nearest = [n * sequence_length for n in (whole, whole + 1) if n > 0]
        raise InputError(
            f"--data.global_batch_tokens {tokens} is no multiple of --data.sequence_length {sequence_length}; the "
            f"nearest that are: {' and '.join(map(str, nearest))}"
        )
    return whole


def check_sizes(sequence_length: int, batch_size: int, num_workers: int) -> None:
    """Check the sizes of a micro-batch and the number of worker processes.

    Raises:
        InputError: If one is too small, or needs more memory than this machine has.
    """
    check_at_least(2, "--data.", sequence_length=sequence_length)
    check_at_least(1, "--data.", batch_size=batch_size)
    check_batch(batch_size, sequence_length)
    check_workers(num_workers)


class TokenDataModule(L.LightningDataModule):
    """Evaluates on ``validation_rows``, each row once over all ranks. A subclass makes these rows and trains.

    Attributes:
        tokenizer: Tokenizer of the data, set by ``setup``.
        validation_rows: Held-out rows, set by ``setup``.
        batch_size: Rows of a micro-batch on one device (B).
        global_batch_size: Rows of an optimizer step over all devices, or None.
        sequence_length: Tokens of a row (T).
        tokenizer_name: Name that the user gave, or None.
        row_type: How documents become rows.
        mask_documents: Whether attention in packed rows stays within a document.
    """

    tokenizer: Tokenizer
    validation_rows: Dataset
    batch_size: int
    global_batch_size: int | None
    sequence_length: int
    tokenizer_name: str | None
    row_type: Literal["padded", "packed"]
    mask_documents: bool = False
    _began_with: Identity | None = None
    _known: Identity | None = None
    _run_tokenizer: Path | None = None
    _chosen: Tokenizer | None = None
    _stage: str = "fit"
    _state_type: type = StoredState
    """Type of the state of this data module in a checkpoint."""
    _shares_state_with: tuple[str, ...] = ()
    """Names of the data modules that can resume from each other's states."""

    @property
    def identity(self) -> Identity | None:
        """Identity of this data, set by ``setup``; see :mod:`cola_lightning.data.identity`."""
        return self._known

    def val_dataloader(self) -> EvalLoader:
        return EvalLoader(self.validation_rows, self.batch_size, **self._share())

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def on_exception(self, exception: BaseException) -> None:
        """Give torch's loaders their own methods again, in case this one could not be made."""
        unwrap_data_loaders()

    # -- what the run began with --------------------------------------------------------------------------------------

    def begin_from(
        self,
        checkpoint: dict[str, Any],
        run_tokenizer: Path | None,
        training: bool,
        path: object = "the checkpoint",
    ) -> None:
        """Take what a run began with from a checkpoint, before any data is read. Lightning loads states only after
        ``setup``.

        Args:
            checkpoint: The whole checkpoint that the run resumes from, or that is evaluated.
            run_tokenizer: Folder of the tokenizer that the run keeps beside its checkpoints.
            training: Whether the run trains on.
            path: The checkpoint, for messages.

        Raises:
            InputError: If these settings differ from those that the run began with, the run used another kind of data
                module, or its state was altered.
        """
        name = self.state_key(checkpoint)
        if state := checkpoint.get(name):
            self._run_tokenizer = run_tokenizer
            self._remember(state, training, path)
            if training and name != type(self).__qualname__:  # Lightning looks only under this class's own name
                self.load_state_dict(state)
            return
        for name, other in checkpoint.items():
            if not isinstance(other, dict) or IDENTITY not in other:
                continue
            if not training:  # a model may be evaluated on any text, but only with its own tokenizer
                self._run_tokenizer = run_tokenizer
                check_stored(other[IDENTITY], _OtherIdentity, f"{path} in {name}.{IDENTITY}", ALTERED)
                self._began_with = {"fixed": {}, "free": {}, "tokenizer": other[IDENTITY]["tokenizer"]}
            else:
                raise InputError(
                    f"--data is {type(self).__name__}, but the run began with {name}, and its position is one in that; "
                    f"name it, or begin a new run"
                )

    @classmethod
    def state_key(cls, checkpoint: dict[str, Any]) -> str:
        """Return the key of this data module's state in a checkpoint. Lightning saves a state under the name of its
        class, and classes may share their states."""
        return next((name for name in cls._shares_state_with if checkpoint.get(name)), cls.__qualname__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin at the position that ``state_dict`` of the subclass returned.

        Raises:
            InputError: If the data changed since.
        """
        # Lightning warns of every loader that does not keep one state for all ranks.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
        if state_dict and (self._began_with is None or self._began_with != state_dict.get(IDENTITY)):
            self._remember(state_dict, self._stage == "fit")
            if hasattr(self, "tokenizer"):  # setup, which compares, is already done
                self._compare()

    def _remember(self, state: dict[str, Any], training: bool, path: object = "the checkpoint") -> None:
        """Store what the run began with, and refuse settings that differ."""
        if isinstance(state, dict) and not state.get(IDENTITY):
            raise InputError(
                f"{path} does not say what data it was trained on, so that its position in it cannot be used; "
                "begin a new run, with --model.initial_weights to go on from its weights"
            )
        check_stored(state, self._state_type, f"{path} in {type(self).__qualname__}", ALTERED)
        self._began_with = state[IDENTITY]
        self._chosen = None  # choose again, because the run's own tokenizer comes first
        compare_runs(self._began_with, self._settings(), training)

    def _settings(self) -> Identity:
        """Return the settings in the identity of this data, ``fixed`` and ``free``; see :func:`compare_runs`."""
        raise NotImplementedError

    def _identity(self) -> Identity:
        """Return the whole identity; called by ``setup``."""
        raise NotImplementedError

    def _compare(self) -> None:
        """Store the identity of this data, refuse changes since the run began, and warn of harmless ones."""
        self._known = self._identity()
        content = [self._known["tokenizer"]["fingerprint"], *map(content_of, self._known.get("sources", []))]
        everywhere = tell_all(content)
        others = [rank for rank, other in enumerate(everywhere) if other != everywhere[0]]
        if others:
            raise InputError(
                f"ranks {', '.join(map(str, others))} have other data or another tokenizer than rank 0, under the same "
                f"names; bring the same files to every node"
            )
        if self._began_with is not None:
            for change in compare_runs(self._began_with, self._known, self._stage == "fit"):
                rank_zero_warn(hide_secrets(f"since the run began, something changed: {change}"))

    def _choose_tokenizer(self, load: Callable[[], Tokenizer] | None) -> Tokenizer | None:
        """Choose the tokenizer, once. The copy that the run keeps comes first, so that a change of the original, on the
        hub or on a disk, does not change the run.

        Args:
            load: Loads the tokenizer that the user named; None if one is to be trained.

        Raises:
            InputError: If the user named a tokenizer that makes other ids than the run's.
        """
        if self._chosen is None:
            self._chosen = self._own_or_named_tokenizer(load)
        return self._chosen

    def _own_or_named_tokenizer(self, load: Callable[[], Tokenizer] | None) -> Tokenizer | None:
        began = self._began_with and self._began_with["tokenizer"]
        own = Tokenizer.load(str(self._run_tokenizer)) if began and self._run_tokenizer else None
        if not began or own is None or own.fingerprint() != began["fingerprint"]:
            return load() if load else None  # _compare checks it against the run's
        if load is None or self.tokenizer_name is None:
            return own
        on_disk = Path(self.tokenizer_name).expanduser().exists()
        if self.tokenizer_name == began["name"] and not on_disk:
            return own
        if load().fingerprint() != own.fingerprint():
            if self.tokenizer_name != began["name"]:
                raise InputError(
                    f"--data.tokenizer {self.tokenizer_name} makes other ids than the tokenizer of the run; leave it "
                    f"out to go on with that one, or begin a new run in another --run_dir"
                )
            rank_zero_warn(
                f"--data.tokenizer {self.tokenizer_name} was changed since the run began; the run goes on with its "
                f"own, in {self._run_tokenizer}"
            )
        return own

    def _row_shape(self) -> RowShape:
        """Return how documents become rows. A tokenizer without padding fills rows up with its end-of-document id."""
        pad_id = self.tokenizer.eos_id if self.tokenizer.pad_id is None else self.tokenizer.pad_id
        return RowShape(self.sequence_length, self.row_type == "packed", pad_id, self.mask_documents)

    def _overfit_batches(self) -> int | float:
        """Return the trainer's ``overfit_batches``; Lightning sets it outside its constructor, unseen by mypy."""
        return getattr(self.trainer, "overfit_batches", 0)

    def _share(self) -> dict[str, int]:
        """Return which part of the data this rank takes."""
        assert self.trainer is not None
        ranks: dict[str, Any] = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return {"replicas": ranks["num_replicas"], "rank": ranks["rank"]}
