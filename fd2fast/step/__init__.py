"""The grouped step: several segments of one wave optimised in one batch, in pieces that can be exchanged."""

from fd2fast.methods import TERMS
from fd2fast.step.checks import check_losses
from fd2fast.step.grouped import GroupedStep, map_dtype
from fd2fast.step.schedule import Priors, committee_weights, segment_mean_matrix

__all__ = [
    "TERMS",
    "GroupedStep",
    "Priors",
    "check_losses",
    "committee_weights",
    "map_dtype",
    "segment_mean_matrix",
]
