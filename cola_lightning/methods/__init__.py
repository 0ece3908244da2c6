"""One file per method of the low-rank lineage: read it and you have read the whole method."""

from cola_lightning.methods.cola import CoLA
from cola_lightning.methods.lora import LoRA
from cola_lightning.methods.low_rank import LowRank
from cola_lightning.methods.relora import ReLoRA, ReLoRAMerge
from cola_lightning.methods.sltrain import SLTrain
from cola_lightning.methods.sst import SST, SSTRounds
from cola_lightning.methods.switch_lora import SwitchLoRA, SwitchLoRASwitch

__all__ = [
    "SST",
    "CoLA",
    "LoRA",
    "LowRank",
    "ReLoRA",
    "ReLoRAMerge",
    "SLTrain",
    "SSTRounds",
    "SwitchLoRA",
    "SwitchLoRASwitch",
]
