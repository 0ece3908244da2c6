"""Groups of a network's parameters, and one optimizer made of several."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from cola_lightning.errors import InputError
from cola_lightning.models import Projection
from cola_lightning.optim.transformers_adamw import TransformersAdamW

MakeOptimizer = Callable[[Iterable], Optimizer]
"""``f(parameters)`` makes the optimizer."""

ELEMENTWISE = (
    SGD, ASGD, Adadelta, Adagrad, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, TransformersAdamW,
)  # fmt: skip
"""Optimizers that update each entry from the gradient of this entry alone, so that a rank needs only its rows."""


def needs_whole_matrices(optimizer: Optimizer) -> bool:
    """Whether an optimizer may need whole matrices: it is neither elementwise nor written for sharded matrices."""
    return not (isinstance(optimizer, ELEMENTWISE) or getattr(optimizer, "takes_sharded_matrices", False))


class Parameters:
    """The parameters of a network, by group. Iteration gives all of them, so that any optimizer takes this object.

    Attributes:
        all: All parameters, the frozen ones too.
        matrices: Trained matrices of the projections: the weight of a full-rank one, both factors of a low-rank one.
        other: All other trained parameters: embedding, head, norms, scalars.
        embedding: The embedding, if it is trained; a part of ``other``.
        head: The output projection, if it is trained and not the embedding; a part of ``other``.
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
    """Two to four optimizers that are one to the trainer, the schedule and the checkpoint.

    Each group of parameters has a method, a learning rate and a weight decay of its own. The schedule scales all
    learning rates. It runs on one device, under DDP, and under FSDP2 if every part is elementwise, as AdamW is, or
    written for sharded matrices, as GaLore, Fira, APOLLO and :class:`~cola_lightning.optim.Muon` are.

    Args:
        params: A :class:`Parameters`, which the module gives.
        matrix: Makes the optimizer of the projections' matrices.
        other: Makes the optimizer of everything else: norms, scalars, and embedding and head unless named below.
        embedding: Makes the optimizer of the embedding.
        head: Makes the optimizer of the output projection.

    Raises:
        InputError: If ``params`` is not a :class:`Parameters`, or no projection of the network is trained.
    """

    needs_matrices = True  # see cola_lightning.distributed.strategies.check_optimizer

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
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give this object and all parts the same groups and the same state."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = defaultdict(dict, {p: state for part in self.parts for p, state in part.state.items()})
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with an entry for every trained parameter: torch's functions that load a state under FSDP2
        refuse it otherwise. SGD without momentum makes none."""
        if self.state:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.requires_grad:
                        self.state[p]  # a defaultdict
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load each part's state by the part's own method, because some parts correct what torch's method changes."""
        groups = iter(state_dict["param_groups"])
        for part in self.parts:
            own = [next(groups) for _ in part.param_groups]
            numbers = {number for group in own for number in group["params"]}
            state = {number: value for number, value in state_dict["state"].items() if number in numbers}
            part.state = defaultdict(dict)
            part.load_state_dict({"state": state, "param_groups": own})
        self._share()
