"""The differentiable operations of the step; each checks its input, then runs on the backend that takes it."""

from fd2fast.ops import cpu, eager, triton
from fd2fast.ops.activation import activation
from fd2fast.ops.adam_clamp import adam_clamp_
from fd2fast.ops.attention_similarity import attention_similarity_loss
from fd2fast.ops.bilinear_attention_pool import bilinear_attention_pool
from fd2fast.ops.bn_matching import (
    bn_act,
    bn_act_matching,
    bn_matching,
    joined_bn_act_matching,
    match_statistics,
    segment_statistics,
)
from fd2fast.ops.crop_flip_roll import crop_flip_roll
from fd2fast.ops.max_pool import max_pool
from fd2fast.ops.normalized_l2 import normalized_l2
from fd2fast.ops.prototype_loss import prototype_loss

# each of them enters its implementations in the registry
BACKENDS = cpu, eager, triton

__all__ = [
    "activation",
    "adam_clamp_",
    "attention_similarity_loss",
    "bilinear_attention_pool",
    "bn_act",
    "bn_act_matching",
    "bn_matching",
    "crop_flip_roll",
    "joined_bn_act_matching",
    "match_statistics",
    "max_pool",
    "normalized_l2",
    "prototype_loss",
    "segment_statistics",
]
