"""CoLA-LLaMA for ``transformers``: a LLaMA each of whose projections is ``B σ(A x)`` (CoLA, arXiv 2502.10940).

This file stands alone. It lies in the folder of a model, from where it is loaded by

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Everything else, attention, the key-value cache and generation included, is LLaMA's own.
"""

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN


class CoLALlamaConfig(LlamaConfig):
    """LLaMA's configuration, and of the projections:

    Args:
        rank: Width of the bottleneck (R).
        latent_act: σ, ``silu`` for CoLA and ``linear`` for plain low rank.

    The SiLU on the MLP's gate, which the paper leaves out from 350M up, is LLaMA's ``hidden_act``: ``silu`` with it,
    ``linear`` without.
    """

    model_type = "cola_llama"
    base_model_tp_plan = None

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
