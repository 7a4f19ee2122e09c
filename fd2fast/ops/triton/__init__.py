"""The backend triton: the kernels of fd2fast.kernels, on a GPU or in Triton's interpreter; imports triton at the first launch."""

from fd2fast.ops.triton import (
    adam_clamp,
    attention_similarity,
    bilinear_attention_pool,
    bn_matching,
    crop_flip_roll,
    max_pool,
    prototype_loss,
)

__all__ = [
    "adam_clamp",
    "attention_similarity",
    "crop_flip_roll",
    "bilinear_attention_pool",
    "bn_matching",
    "max_pool",
    "prototype_loss",
]
