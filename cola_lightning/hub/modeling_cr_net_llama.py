"""CR-Net-LLaMA for ``transformers`` (CR-Net, arXiv 2509.18993).

Every projection adds a low-rank product to the output of the same projection in the layer before:
``Y_l = s Y_{l-1} + B A x``. In the first layer it is one dense matrix.

This file needs nothing else but transformers. It is in the folder of a model, and is loaded by

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

All other parts, such as attention, the KV cache and generation, are LLaMA's own.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

EPSILON = 1e-6


class CRNetLlamaConfig(LlamaConfig):
    """LLaMA's configuration with further arguments for the projections.

    Args:
        rank: Width of the bottleneck (R).
    """

    model_type = "cr_net_llama"
    base_model_tp_plan = None  # type: ignore[assignment]  # LLaMA's plan for tensor parallelism does not fit

    rank: int = 128


class FirstLinear(nn.Linear):
    """The dense matrix of the first layer, (…, in) -> (…, out). It keeps its output for the next layer."""

    output: Tensor | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.output = super().forward(x)
        return self.output


class Scalar(nn.Module):
    """One learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


class CrossLayerLinear(nn.Module):
    """``s y + B A x``, (…, in) -> (…, out).

    y is the output of the same projection in the layer before, for the same tokens. The module keeps its own output
    for the next layer.
    """

    output: Tensor | None = None

    def __init__(
        self, in_features: int, out_features: int, rank: int, before: "FirstLinear | CrossLayerLinear"
    ) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)
        self.beta = Scalar()
        self.before = (before,)  # in a tuple, so that it is not registered as a submodule

    def forward(self, x: Tensor) -> Tensor:
        before = self.before[0].output
        assert before is not None, "the layer before has not run"
        beta = self.beta.weight
        scale = torch.where(beta < 0, beta - EPSILON, beta + EPSILON)
        added = self.B(self.A(x))
        output = scale * before.to(added.device) + added
        self.output = output
        return output.to(added.dtype)


def forget(model: nn.Module, *_) -> None:
    """Drop the outputs after a forward pass."""
    for module in model.modules():
        if isinstance(module, FirstLinear | CrossLayerLinear):
            module.output = None


class CRNetLlamaForCausalLM(LlamaForCausalLM):
    """LLaMA with CR-Net's projections."""

    config_class = CRNetLlamaConfig
    supports_gradient_checkpointing = False  # a layer that runs again would not find the outputs

    def __init__(self, config: CRNetLlamaConfig) -> None:
        super().__init__(config)
        before: dict[str, FirstLinear | CrossLayerLinear] = {}
        module: FirstLinear | CrossLayerLinear
        for layer in self.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, dense in list(part.named_children()):
                    if isinstance(dense, nn.Linear):
                        sizes = dense.in_features, dense.out_features
                        if name in before:
                            module = CrossLayerLinear(*sizes, config.rank, before[name])
                        else:
                            module = FirstLinear(*sizes)
                        before[name] = module
                        setattr(part, name, module)
        self.model.register_forward_hook(forget)
        self.post_init()
