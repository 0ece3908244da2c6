"""CoLA-LLaMA for ``transformers``: a LLaMA with projections ``B σ(A x)`` (CoLA, arXiv 2502.10940).

This file needs nothing else but transformers. It is in the folder of a model, and is loaded by

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

All other parts, such as attention, the KV cache and generation, are LLaMA's own.
"""

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN


class CoLALlamaConfig(LlamaConfig):
    """LLaMA's configuration with further arguments for the projections.

    Args:
        rank: Width of the bottleneck (R).
        latent_act: The function σ: ``silu`` for CoLA, ``linear`` for plain low rank.

    LLaMA's ``hidden_act`` is ``silu`` with the SiLU on the MLP's gate, and ``linear`` without it. The paper leaves it
    out from 350M up.
    """

    model_type = "cola_llama"
    base_model_tp_plan = None  # type: ignore[assignment]  # LLaMA's plan for tensor parallelism does not fit

    rank: int = 128
    latent_act: str = "silu"


class LowRankLinear(nn.Module):
    """``B σ(A x)``: (…, in) -> (…, R) -> (…, out)."""

    def __init__(self, in_features: int, out_features: int, rank: int, act: str) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)
        self.act = ACT2FN[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.act(self.A(x)))


class CoLALlamaForCausalLM(LlamaForCausalLM):
    """LLaMA with CoLA's projections."""

    config_class = CoLALlamaConfig

    def __init__(self, config: CoLALlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, dense in list(part.named_children()):
                    if isinstance(dense, nn.Linear):
                        low_rank = LowRankLinear(dense.in_features, dense.out_features, config.rank, config.latent_act)
                        setattr(part, name, low_rank)
        self.post_init()
