"""Which parameters an optimizer is for, and one optimizer made of several."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from cola_lightning.errors import InputError
from cola_lightning.models import Projection
from cola_lightning.optim.transformers_adamw import TransformersAdamW

MakeOptimizer = Callable[[Iterable], Optimizer]
"""``f(parameters)`` makes the optimizer."""


ENTRY_BY_ENTRY = (SGD, Adam, AdamW, Adamax, NAdam, RAdam, TransformersAdamW)
"""Optimizers that update each entry from its own gradient alone, so that a matrix may be cut into pieces."""


class Parameters:
    """The parameters of a network, told apart. To iterate gives them all, so that any optimizer takes this object.

    Attributes:
        matrices: Trained matrices of the projections: of a full-rank one its weight, of a low-rank one both factors.
        other: Whatever else is trained: embedding, head, norms, scalars.
        embedding: The embedding, if it is trained; a part of ``other``.
        head: The output projection, likewise.
    """

    def __init__(self, network: nn.Module) -> None:
        self.all = list(network.parameters())
        projections = (module for module in network.modules() if isinstance(module, Projection))
        inside = {id(p) for projection in projections for p in projection.parameters() if p.ndim == 2}
        trained = [p for p in self.all if p.requires_grad]
        self.matrices = [p for p in trained if id(p) in inside]
        self.other = [p for p in trained if id(p) not in inside]
        embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
        heads = {id(p) for p in getattr(network, "lm_head", nn.Module()).parameters()}
        self.embedding = [p for p in self.other if id(p) in embeddings]
        self.head = [p for p in self.other if id(p) in heads - embeddings]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.all)


class HybridOptimizer(Optimizer):
    """Two to four optimizers that look like one to trainer, schedule and checkpoint. They give groups of parameters
    learning rates and weight decays of their own, or other methods. A schedule scales the learning rates of all.

    Where every part treats each entry by itself, as AdamW does, it goes with one device, DDP and FSDP2. Others need
    whole matrices: one device, or DDP.

    Args:
        params: The module hands over its :class:`Parameters`.
        matrix: Makes the optimizer of the projections' matrices.
        other: Makes the optimizer of everything else: norms, scalars, and embedding and head unless named below.
        embedding: Makes the optimizer of the embedding.
        head: Makes the optimizer of the output projection.

    Raises:
        InputError: If the parameters are not told apart, or the network has no projection that is trained.
    """

    named_parameters_only = (
        True  # strategies that flatten parameters are refused, see cola_lightning.distributed.strategies
    )

    def __init__(
        self,
        params: Iterable,
        matrix: MakeOptimizer,
        other: MakeOptimizer,
        embedding: MakeOptimizer | None = None,
        head: MakeOptimizer | None = None,
    ) -> None:
        if not isinstance(params, Parameters):
            raise InputError(f"HybridOptimizer was given a {type(params).__name__}; give it Parameters(network)")
        if not params.matrices:
            raise InputError("HybridOptimizer finds no trained matrix in any projection; name a plain optimizer")
        own = {id(p) for make, group in ((embedding, params.embedding), (head, params.head)) if make for p in group}
        groups = [
            (matrix, params.matrices),
            (embedding, params.embedding),
            (head, params.head),
            (other, [p for p in params.other if id(p) not in own]),
        ]
        self.parts = tuple(make(group) for make, group in groups if make and group)
        self.whole_matrices = not all(isinstance(part, ENTRY_BY_ENTRY) for part in self.parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let all see the same groups and the same state as this object shows."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = defaultdict(dict, {p: state for part in self.parts for p, state in part.state.items()})
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each part takes its own, for some have to mend what loading does to their state."""
        groups = iter(state_dict["param_groups"])
        for part in self.parts:
            own = [next(groups) for _ in part.param_groups]
            numbers = {number for group in own for number in group["params"]}
            state = {number: value for number, value in state_dict["state"].items() if number in numbers}
            part.state = defaultdict(dict)
            part.load_state_dict({"state": state, "param_groups": own})
        self._share()
