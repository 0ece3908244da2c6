"""The distributions from which weights are initialized, and the rule by which modules draw them.

A module that owns parameters directly has a ``reset_parameters``, which alone decides their first values. Code that
fills a network module by module (FSDP, FSDP2, ZeRO-3) then gets the same distributions as code that builds it whole.

========================================  ==============================================================
embedding, head, dense projections        N(0, 0.02²), as LLaMA; :data:`WEIGHT_STD`
both factors of CoLA and plain low rank   N(0, s²) with s of :func:`low_rank_std`
other low-rank methods                    their own ``reset_parameters``, in ``cola_lightning/methods``
norms                                     ones
========================================  ==============================================================
"""

WEIGHT_STD = 0.02
"""Standard deviation of LLaMA's weights."""


def low_rank_std(in_features: int, out_features: int, rank: int) -> float:
    """Compute the standard deviation s of both factors' entries: s = R^(-1/4) (in + out)^(-1/4).

    An entry of the product ``B A`` is a sum of R products of two entries, so its variance is R s⁴ = 1 / (in + out).
    The CoLA reference implementation (alvin-zyl/CoLA) initializes its factors this way.
    """
    return (rank * (in_features + out_features)) ** -0.25
