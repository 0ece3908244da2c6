"""Export a model: weights, tokenizer and model card in one folder that transformers loads."""

from functools import partial
from pathlib import Path

from cola_lightning.hub.card import model_card
from cola_lightning.hub.folder import check_target, write_folder
from cola_lightning.inference.load import load_model_for_inference


def export(
    model: str,
    folder: str,
    tokenizer: str | None = None,
    merge: bool = False,
    max_shard_size: str = "5GB",
    trust: list[str] | None = None,
) -> None:
    """Write a model as a folder that transformers loads, with tokenizer and model card.

    Full rank comes out as a plain LlamaForCausalLM, and so do LoRA, ReLoRA, SLTrain, SwitchLoRA and SST, as one matrix
    each. CoLA, low rank, CR-Net and LaX bring a small modelling file of their own, for which transformers asks for
    trust_remote_code=True. What was written is read back before it counts.

    Args:
        model: Checkpoint of any strategy, directory of a run, or folder that is to be converted.
        folder: Where to; must not exist, or be empty.
        tokenizer: Folder, tokenizer.json or repository on the hub; that of the run if not given.
        merge: Multiply low-rank factors out, so that a plain LlamaForCausalLM comes out. CoLA's cannot be.
        max_shard_size: Weights above this size are written in several files.
        trust: Classes, or packages, of which a checkpoint may name code besides this package's.

    Raises:
        InputError: If the model, its tokenizer or the place cannot be had.
    """
    target = Path(folder).expanduser()
    check_target(target, max_shard_size)
    trained = load_model_for_inference(model, trust or ())
    card = partial(model_card, trained, target.resolve().name)
    write_folder(trained.network, target, trained.tokenizer(tokenizer), card, merge, max_shard_size)
    print(f"wrote {target}: {', '.join(sorted(file.name for file in target.iterdir()))}")
