"""One file per method of the low-rank lineage: read it and you have read the whole method."""

from cola_lightning.methods.cola import CoLA
from cola_lightning.methods.cr_net import CRNet
from cola_lightning.methods.lax import LaX
from cola_lightning.methods.low_rank import LowRank

__all__ = ["CRNet", "CoLA", "LaX", "LowRank"]
