"""Check that the data fits the model, and find its state in a checkpoint."""

from typing import Any

from cola_lightning.data.token_data_module import TokenDataModule
from cola_lightning.errors import InputError
from cola_lightning.models import LlamaConfig


def check_data_fits(data: Any, config: LlamaConfig) -> None:
    """Compare sequence length, vocabulary and padding id of a data module with the sizes of the model.

    Args:
        data: A data module, or None. Only what it has of ``sequence_length`` and ``tokenizer`` is compared.
        config: Sizes of the model.

    Raises:
        InputError: Names the two values that do not fit, and the flag to change.
    """
    length = getattr(data, "sequence_length", None)
    if length is not None and length > config.max_position_embeddings:
        raise InputError(
            f"--data.sequence_length {length} is beyond --model.max_position_embeddings "
            f"{config.max_position_embeddings}; lower the first or raise the second"
        )
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is None:
        return
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the embedding has only "
            f"{config.vocab_size} rows; set --model.vocab_size {tokenizer.vocab_size}"
        )
    if config.pad_token_id is not None and config.pad_token_id != tokenizer.pad_id:
        fix = "null" if tokenizer.pad_id is None else tokenizer.pad_id
        raise InputError(
            f"--model.pad_token_id {config.pad_token_id} would hold the embedding of "
            f"{tokenizer.decode([config.pad_token_id])!r} at zero, because tokenizer {tokenizer.name} pads with "
            f"{tokenizer.pad_id}; set --model.pad_token_id {fix}"
        )


def rename_data_state(data: Any, checkpoint: dict[str, Any]) -> None:
    """Name the state of the data in a checkpoint by the class of this run's data module.

    Lightning restores the state under exactly that name. ``StreamingDataModule`` and ``C4DataModule`` share their
    states, so one would otherwise begin anew on a checkpoint of the other.
    """
    if isinstance(data, TokenDataModule) and (state := checkpoint.get(data.state_key(checkpoint))):
        checkpoint.setdefault(type(data).__qualname__, state)
