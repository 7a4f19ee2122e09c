"""The backend cpu: the C++ extensions, on fp32 and bf16 tensors of a CPU."""

from fd2fast.ops.cpu import adam_clamp, bilinear_attention_pool, bn_matching, crop_flip_roll, max_pool, prototype_loss

__all__ = ["adam_clamp", "crop_flip_roll", "bilinear_attention_pool", "bn_matching", "max_pool", "prototype_loss"]
