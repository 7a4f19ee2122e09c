"""LPLD: SRe2L whose BN matching is within a class: the images of one class share statistics (Xiao and He, NeurIPS 2024).

They match the teacher's own statistics (the published code's hook "class"), not those of each class's training images.
"""

from fd2fast.methods.method import Method
from fd2fast.methods.registry import register_method

LPLD = Method(
    "SRe2L from noise, BN statistics shared by the images of one class",
    fields={"init": "noise", "sizes": (224,), "residual": 1.0, "teacher_schedule": "all", "augment": True},
    paper={"lr": 0.25, "r_bn": 0.01, "iterations": (4000,), "save_format": "png"},
    released={"lr": 0.25, "r_bn": 0.01, "iterations": (4000,), "save_format": "jpg"},
    patch_factor=None,
    layout="within",
)

register_method("lpld", LPLD)
