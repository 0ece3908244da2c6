"""Read the outcome of a training run from its events and its checkpoint, and keep it in files."""

import json
import math
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Len
from typing_extensions import TypedDict

from cola_lightning.checkpoints.formats import read_state, tokens_of
from cola_lightning.checkpoints.latest import LINK
from cola_lightning.errors import InputError
from cola_lightning.loggers import read_scalars
from cola_lightning.output_files import write_whole
from cola_lightning.provenance import read_provenance
from cola_lightning.stored_data import Count, read_json

PERPLEXITY, PUBLISHED = "val/perplexity", "val/perplexity_as_published"
LOSS, TOKENS, SPEED = "train/loss", "train/tokens", "train/tokens_per_second"


class StoredResult(TypedDict):
    """Result of a trial at one budget: the keys that are read back."""

    perplexity: float
    perplexity_as_published: float
    by_source: dict[str, float]
    tasks: NotRequired[dict[str, dict[str, float]]]
    steps: Count
    tokens: Count
    seconds: float | None
    curve: list[list[float]]
    commit: str | None
    data: list[dict[str, Any]]
    method: str
    matrix: float
    other: float
    seed: Count
    budget: Count


class StoredCosts(TypedDict):
    """Costs of a method, as ``benchmark`` counts them."""

    subjects: Annotated[list[dict[str, Any]], Len(1)]


def read_outcome(run_dir: Path, steps: int, trunk: Path | None = None, trunk_steps: int = 0) -> dict[str, Any]:
    """Read the result of a finished run.

    Args:
        run_dir: Directory of the run.
        steps: Length of the run in optimizer steps.
        trunk: Directory of the run from whose checkpoint this one began, if any. It has the first part of the curve,
            unless this run began at step 0.
        trunk_steps: Step of that checkpoint.

    Returns:
        The perplexities; ``tokens`` that the run was trained on; ``seconds`` of training without validation, None if
        they are not known; ``curve``, the training loss as [step, tokens, nats] at each logged step; commit and data.
        Only the curve depends on how often the run has logged, and is empty if it never did. Seconds of the steps
        after the last log are those of the others, by the token.

    Raises:
        InputError: If the last step was not validated, or the last checkpoint does not have the count of tokens.
    """
    scalars = read_scalars(run_dir)
    perplexity = scalars.get(PERPLEXITY, {})
    reached = max(perplexity, default=-1) + 1  # events count steps from 0
    if reached < steps:
        validated = f"the last validation was after step {reached:,}" if reached else "there was no validation"
        raise InputError(f"it ends with step {steps:,}, but {validated}")
    checkpoint = run_dir / "checkpoints" / LINK
    tokens = tokens_of(read_state(checkpoint))
    if tokens is None:
        raise InputError(f"{checkpoint} does not have the count of tokens, which the callback Throughput stores")
    from_trunk = trunk is not None and min(scalars.get(LOSS, ()), default=trunk_steps) >= trunk_steps
    parts = [(read_scalars(trunk), trunk_steps), (scalars, steps)] if trunk and from_trunk else [(scalars, steps)]
    curve: list[list[float]] = []
    seconds, begun = 0.0, 0
    for events, end in parts:
        for step in sorted(events.get(LOSS, {})):
            # Events of a trunk that went on after this budget do not belong to it.
            if not begun <= step < end or step not in events.get(TOKENS, {}):
                continue
            before = curve[-1][1] if curve else 0
            curve.append([step + 1, int(events[TOKENS][step]), events[LOSS][step]])
            if speed := events.get(SPEED, {}).get(step):
                seconds += (curve[-1][1] - before) / speed
        begun = end
    facts = read_provenance(run_dir)
    return {
        "perplexity": perplexity[max(perplexity)],
        "perplexity_as_published": scalars[PUBLISHED][max(perplexity)],
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds * (tokens / curve[-1][1]) if seconds else None,
        "curve": curve,
        "commit": facts.get("commit"),
        "data": [
            {key: source[key] for key in ("names", "paths", "commit", "sizes", "contents")}
            for source in (facts.get("data") or {}).get("sources", [])
        ],
    }


def loss_of(perplexity: float) -> float:
    """Return the mean loss in nats per token; infinity if the perplexity is not a positive number."""
    return math.log(perplexity) if math.isfinite(perplexity) and perplexity > 0 else math.inf


def read(file: Path, kind: type) -> dict[str, Any] | None:
    """Read a result or costs that a comparison wrote before; None if the file is missing.

    Args:
        file: JSON.
        kind: Type that describes its content.

    Raises:
        InputError: If the file is damaged.
    """
    return read_json(file, "delete the file, and it is made again", kind) if file.is_file() else None


def write(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file completely or not at all."""
    write_whole(file, json.dumps(content, indent=1))
