"""Describe projections that are not plain matrices in a folder for transformers.

There is one entry for each method with a modelling file. ``export`` writes by it, and ``load_model`` reads by it. A
method that is linear in its input needs none, because it is written as dense matrices of a plain LLaMA.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cola_lightning.methods import CoLA, CRNet, LaX, LowRank
from cola_lightning.methods.cr_net import FirstOfCRNet
from cola_lightning.models import Llama, MakeProjection, Projection


@dataclass(frozen=True)
class Layout:
    """The description of a kind of projection in ``config.json``.

    Args:
        projection: Class of the projections.
        model_type: ``model_type`` of the model in ``config.json``.
        name: Beginning of the names of the classes in the modelling file, ``modeling_<model_type>.py``.
        arguments: Arguments of the class, with their types. They are also keys of ``config.json`` and attributes of a
            projection.
        fixed: Further keys, which distinguish this projection from others with the same ``model_type``.
        first: Class of the projections in the first layer, if it is another one.
    """

    projection: type[Projection]
    model_type: str
    name: str
    arguments: dict[str, type] = field(default_factory=lambda: {"rank": int})
    fixed: dict[str, Any] = field(default_factory=dict)
    first: type[Projection] | None = None

    @property
    def modelling_file(self) -> str:
        """Name of the modelling file."""
        return f"modeling_{self.model_type}.py"

    def describe(self, projection: Projection) -> dict[str, Any]:
        """Make the keys of ``config.json`` for a projection."""
        return self.fixed | {name: getattr(projection, name) for name in self.arguments}

    def matches(self, config: dict[str, Any]) -> bool:
        """Say whether a ``config.json`` describes this kind."""
        return config.get("model_type") == self.model_type and all(
            config.get(key, value) == value for key, value in self.fixed.items()
        )

    def make(self, arguments: dict[str, Any]) -> MakeProjection:
        """Make the projections that a ``config.json`` describes, from the values of ``arguments``."""
        return partial(self.projection, **arguments)


LAYOUTS = (
    Layout(CoLA, "cola_llama", "CoLALlama", fixed={"latent_act": "silu"}),
    Layout(LowRank, "cola_llama", "CoLALlama", fixed={"latent_act": "linear"}),
    Layout(CRNet, "cr_net_llama", "CRNetLlama", first=FirstOfCRNet),
    Layout(LaX, "lax_llama", "LaXLlama", arguments={"rank": int, "gate": str}),
)


def example_projection(network: Llama) -> Projection:
    """Return a projection of the last layer. Some methods have another kind in the first layer."""
    return [*network.blocks()][-1].self_attn.q_proj


def layout_of(projection: Projection) -> Layout | None:
    """Return the layout of a projection's class, not of its base classes; None if there is none."""
    return next((layout for layout in LAYOUTS if type(projection) is layout.projection), None)
