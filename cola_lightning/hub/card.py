"""Make the model card of an exported model from what its run has recorded."""

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from cola_lightning.checkpoints.formats import tokens_of
from cola_lightning.checkpoints.projection_formats import example_projection
from cola_lightning.errors import hide_secrets
from cola_lightning.inference.load import LoadedModel
from cola_lightning.loggers import read_scalars
from cola_lightning.provenance import libraries, read_provenance
from cola_lightning.stored_data import Count, is_stored_as

NOT_KNOWN = "not recorded"
"""Text for a fact that the run has not recorded."""


def model_card(trained: LoadedModel, name: str, config: dict[str, Any]) -> str:
    """Make the ``README.md`` of a folder, in the Hugging Face hub's layout.

    Args:
        trained: The model.
        name: Title of the card.
        config: Content of ``config.json``.
    """
    low_rank = "auto_map" in config  # such a model needs a modelling file
    if trained.checkpoint is not None:
        origin = "pre-trained with cola_lightning"
        tokens = (
            "The tokenizer adds no special id to a text. In training, each document ended with the end-of-document id."
        )
    else:
        origin = f"converted by cola_lightning from {trained.path.name}"
        tokens = f"Tokenizer and generation settings are those of {trained.path.name}, unless others were named."
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts(trained).items())
    remote = ", trust_remote_code=True" if low_rank else ""
    reason = "\n`trust_remote_code` allows the small modelling file in this folder to run.\n" if low_rank else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{"cola, low-rank" if low_rank else "llama"}]
---

# {name}

A language model, {origin}.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER"{remote})
model = AutoModelForCausalLM.from_pretrained("FOLDER"{remote})
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=60)[0]))
```
{reason}
{tokens}
"""


def facts(trained: LoadedModel) -> dict[str, str]:
    """Collect what is known of a model, as texts by name."""
    projection = example_projection(trained.network)
    dtype = str(trained.network.lm_head.weight.dtype).removeprefix("torch.")
    rank = "" if projection.rank is None else f", rank {projection.rank}"
    found = {
        "method": f"{type(projection).__name__}{rank}",
        "parameters": f"{sum(parameter.numel() for parameter in trained.network.parameters()):,}, {dtype}",
    }
    if trained.checkpoint is None:
        return found | {"exported from": trained.path.name}
    step, run = trained.checkpoint.step, read_provenance(trained.run_dir)
    tokens = tokens_of(trained.checkpoint.state)
    perplexity = NOT_KNOWN
    measured = _perplexities(trained.run_dir) if trained.run_dir else {}
    if step in measured:
        perplexity = f"{measured[step]:,.2f} per token"
    elif before := [other for other in measured if other < step]:
        perplexity = f"{NOT_KNOWN} at this step; {measured[max(before)]:,.2f} per token at step {max(before):,}"
    return found | {
        "data": _data(trained.configuration().get("data") or {}, run.get("data") or {}),
        "steps": f"{step:,}",
        "tokens seen": NOT_KNOWN if tokens is None else f"{tokens:,}",
        "validation perplexity": perplexity,
        "trained with": ", ".join(f"{key} {value}" for key, value in run.get("libraries", {}).items()) or NOT_KNOWN,
        "commit of cola_lightning": run.get("commit") or NOT_KNOWN,
        "exported with": ", ".join(f"{key} {value}" for key, value in libraries().items()),
    }


class _Source(TypedDict, total=False):
    """Arguments of a data source that a card names."""

    path: str | None
    name: str | None
    revision: str | None
    paths: list[str]


class _Arguments(_Source, total=False):
    """Arguments of this package's data modules that a card names."""

    sources: list[_Source] | None
    sequence_length: Count


def _data(data: dict[str, Any], identity: dict[str, Any]) -> str:
    """Name the sources of the data, with their commits if the run has recorded them.

    Args:
        data: The data module in the run's config.
        identity: The identity of the data in ``run.json``.
    """
    arguments = data.get("init_args") or {}
    if not is_stored_as(arguments, _Arguments):  # arguments of a user's own data module
        return NOT_KNOWN
    sources = arguments.get("sources") or [arguments]
    found = identity.get("sources") or []
    if len(found) == len(sources):
        sources = [
            {"path": f"{one['title']} at commit {one['commit']}"} if one.get("commit") else source
            for one, source in zip(found, sources, strict=True)
        ]
    names = [
        " ".join(filter(None, (source.get("path"), source.get("name"), source.get("revision")))) or source.get("paths")
        for source in sources
    ]
    # Of a file on this machine only the name is given, because a card is read by others.
    flat = [Path(str(part)).name if str(part).startswith(("/", "~", ".")) else str(part)
            for entry in names for part in (entry if isinstance(entry, list) else [entry]) if part]  # fmt: skip
    rows = f", rows of {arguments['sequence_length']} tokens" if "sequence_length" in arguments else ""
    return hide_secrets(", ".join(flat)) + rows if flat else NOT_KNOWN


def _perplexities(run_dir: Path) -> dict[int, float]:
    """Read the validation perplexities of a run, by the number of optimizer steps."""
    # Lightning logs with the index of the last step, which begins at 0.
    return {step + 1: value for step, value in read_scalars(run_dir).get("val/perplexity", {}).items()}
