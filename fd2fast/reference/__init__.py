"""Plain-torch specifications of the operations; they are also the backend for whatever no other takes."""

from fd2fast.reference.activation import activation
from fd2fast.reference.adam_clamp import adam_clamp_
from fd2fast.reference.attention_similarity import attention_similarity_loss
from fd2fast.reference.bilinear_attention_pool import bilinear_attention_pool
from fd2fast.reference.bn_matching import bn_act, bn_act_matching, bn_matching, match_statistics, segment_statistics
from fd2fast.reference.crop_flip_roll import crop_flip_roll
from fd2fast.reference.max_pool import max_pool
from fd2fast.reference.normalized_l2 import normalized_l2
from fd2fast.reference.prototype_loss import prototype_loss

__all__ = [
    "activation",
    "adam_clamp_",
    "attention_similarity_loss",
    "bilinear_attention_pool",
    "bn_act",
    "bn_act_matching",
    "bn_matching",
    "crop_flip_roll",
    "match_statistics",
    "max_pool",
    "normalized_l2",
    "prototype_loss",
    "segment_statistics",
]
