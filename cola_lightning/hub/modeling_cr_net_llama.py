"""CR-Net-LLaMA for ``transformers`` (CR-Net, arXiv 2509.18993).

Every projection adds something of low rank to the output of the same projection in the layer before,
``Y_l = s Y_{l-1} + B A x``; in the first layer it is one dense matrix.

This file stands alone. It lies in the folder of a model, from where it is loaded by

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Everything else, attention, the key-value cache and generation included, is LLaMA's own.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

EPSILON = 1e-6


class CRNetLlamaConfig(LlamaConfig):
    """LLaMA's configuration, and of the projections:

    Args:
        rank: Width of the bottleneck (R).
    """

    model_type = "cr_net_llama"
    base_model_tp_plan = None

    rank: int = 128


class FirstLinear(nn.Linear):
    """The dense matrix of the first layer. It remembers its output, for the next layer to take."""

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
    """``s y + B A x``, y the output of the same projection in the layer before, for the same tokens."""

    output: Tensor | None = None

    def __init__(self, in_features: int, out_features: int, rank: int, before: nn.Module) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)
        self.beta = Scalar()
        self.before = (before,)  # in a tuple, so that it is not taken for a part of this module

    def forward(self, x: Tensor) -> Tensor:
        beta = self.beta.weight
        scale = torch.where(beta < 0, beta - EPSILON, beta + EPSILON)
        added = self.B(self.A(x))
        self.output = scale * self.before[0].output.to(added.device) + added
        return self.output.to(added.dtype)


def forget(model: nn.Module, *_) -> None:
    """Let go of the outputs when a forward pass is over."""
    for module in model.modules():
        if isinstance(module, FirstLinear | CrossLayerLinear):
            module.output = None


class CRNetLlamaForCausalLM(LlamaForCausalLM):
    config_class = CRNetLlamaConfig
    supports_gradient_checkpointing = False  # a layer that is run again would find the outputs of another gone

    def __init__(self, config: CRNetLlamaConfig) -> None:
        super().__init__(config)
        before: dict[str, nn.Module] = {}
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
