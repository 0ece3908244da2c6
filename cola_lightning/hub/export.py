"""Export a model as one folder of weights, tokenizer and model card that transformers loads."""

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

    Full rank is written as a plain LlamaForCausalLM. So are LoRA, ReLoRA, SLTrain, SwitchLoRA and SST, with their
    factors multiplied out. CoLA, low rank, CR-Net and LaX are written with a small modelling file, for which
    transformers needs trust_remote_code=True. The folder is read back and compared before it appears.

    Args:
        model: Checkpoint of any strategy, directory of a run, or folder to convert.
        folder: Folder to write. It must not exist yet, or be empty.
        tokenizer: Folder, tokenizer.json or repository on the hub; the run's own if not given.
        merge: Multiply low-rank factors out, to write a plain LlamaForCausalLM. This is not possible with CoLA.
        max_shard_size: Largest size of a file of weights. Larger weights are written in several files.
        trust: Classes or packages that a checkpoint may name, in addition to this package's.

    Raises:
        InputError: If the model or its tokenizer cannot be loaded, or the folder cannot be written.
    """
    target = Path(folder).expanduser()
    check_target(target, max_shard_size)
    trained = load_model_for_inference(model, trust or ())
    card = partial(model_card, trained, target.resolve().name)
    write_folder(trained.network, target, trained.tokenizer(tokenizer), card, merge, max_shard_size)
    print(f"wrote {target}: {', '.join(sorted(file.name for file in target.iterdir()))}")
