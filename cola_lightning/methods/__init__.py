"""The low-rank methods, one file each: a method's projection and its callback are in the same file."""

from cola_lightning.methods.cola import CoLA
from cola_lightning.methods.cola_m.callback import CoLAM
from cola_lightning.methods.cr_net import CRNet, CRNetRecompute
from cola_lightning.methods.lax import LaX
from cola_lightning.methods.lora import LoRA
from cola_lightning.methods.low_rank import LowRank
from cola_lightning.methods.relora import ReLoRA, ReLoRACallback
from cola_lightning.methods.sltrain import SLTrain
from cola_lightning.methods.sst import SST, SSTCallback
from cola_lightning.methods.switch_lora import SwitchLoRA, SwitchLoRACallback

__all__ = [
    "SST",
    "CRNet",
    "CRNetRecompute",
    "CoLA",
    "CoLAM",
    "LaX",
    "LoRA",
    "LowRank",
    "ReLoRA",
    "ReLoRACallback",
    "SLTrain",
    "SSTCallback",
    "SwitchLoRA",
    "SwitchLoRACallback",
]
