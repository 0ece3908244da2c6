"""Set what a sweep varies: the learning rates of the projections' matrices and of all other parameters, and β2."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

from cola_lightning.errors import InputError

HYBRID = "cola_lightning.optim.HybridOptimizer"


class Rates(NamedTuple):
    """Pair of peak learning rates, and β2, the decay rate of Adam's second moment; None for that of the files."""

    matrix: float
    other: float
    beta2: float | None = None

    @property
    def name(self) -> str:
        """Name of the settings in a folder's name."""
        return f"m{self.matrix:g}-o{self.other:g}" + ("" if self.beta2 is None else f"-b{self.beta2:g}")

    @property
    def title(self) -> str:
        text = f"matrix rate {self.matrix:g}, other rate {self.other:g}"
        return text if self.beta2 is None else f"{text}, β₂ {self.beta2:g}"


def parts(optimizer: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the parts of an optimizer, each with the name of its parameters. A plain one has one part, ``all``."""
    if not is_hybrid(optimizer):
        yield "all", optimizer
        return
    for name in ("matrix", "embedding", "head", "other"):
        if part := optimizer["init_args"].get(name):
            yield name, part


def is_hybrid(optimizer: dict[str, Any]) -> bool:
    return optimizer["class_path"].rpartition(".")[2] == HYBRID.rpartition(".")[2]


def set_rates(optimizer: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """Return the settings of an optimizer with these rates. A plain optimizer becomes a HybridOptimizer of two.

    Args:
        optimizer: ``class_path`` and ``init_args``.
        rates: Learning rates. Embedding and head get the other rate, too. Every part that has ``betas`` gets β2.

    Raises:
        InputError: If a part has no learning rate, or none has ``betas`` for β2.
    """
    made = deepcopy(optimizer)
    if not is_hybrid(made):
        made = {"class_path": HYBRID, "init_args": {"matrix": made, "other": deepcopy(made)}}
    for name, part in parts(made):
        if "lr" not in part["init_args"]:
            raise InputError(f"{part['class_path']} has no lr, so its learning rate cannot be swept")
        part["init_args"]["lr"] = rates.matrix if name == "matrix" else rates.other
    if rates.beta2 is not None:
        settings = [part["init_args"] for _, part in parts(made) if part["init_args"].get("betas")]
        if not settings:
            raise InputError(
                f"{optimizer['class_path']} has no betas, so beta2 cannot be swept; remove it from the plan"
            )
        for each in settings:
            each["betas"] = [each["betas"][0], rates.beta2]
    return made


def set_weight_decay(optimizer: dict[str, Any], value: float) -> None:
    """Set the weight decay of every part that has one."""
    for _, part in parts(optimizer):
        if "weight_decay" in part["init_args"]:
            part["init_args"]["weight_decay"] = value


def published_ratio(optimizer: dict[str, Any]) -> float:
    """Return the rate of the other parameters over that of the matrices."""
    found = {name: part["init_args"].get("lr") for name, part in parts(optimizer)}
    return found["other"] / found["matrix"] if found.get("matrix") and found.get("other") else 1.0


def flatten(settings: Any, path: str = "") -> dict[str, Any]:
    """Return nested settings as one mapping, such as ``{"trainer.max_steps": 100}``; lists stay whole."""
    if not isinstance(settings, dict) or not settings:
        return {path: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flatten(value, f"{path}.{key}".lstrip("."))
    return found
