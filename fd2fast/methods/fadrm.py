"""FADRM and FADRM+: four phases of changing size, each beginning with a residual of the initial image; + takes a committee."""

from dataclasses import replace

from fd2fast.methods.fd2 import with_fd2
from fd2fast.methods.method import Method
from fd2fast.methods.registry import register_method

FIELDS = {
    "init": "patches",
    "sizes": (200, 224, 200, 224),
    "residual": 0.5,
    "teacher_schedule": "round_robin",
    "augment": True,
}
PAPER = {"lr": 0.25, "r_bn": 0.01, "iterations": (500,) * 4, "save_format": "png"}
RELEASED = {"lr": 0.1, "r_bn": 1e-3, "iterations": (1500, 1500, 1500, 2000), "save_format": "jpg"}

FADRM = Method("four phases of changing size, residual of the initial image", FIELDS, PAPER, RELEASED, patch_factor=1)
FADRM_PLUS = replace(FADRM, summary="FADRM with one teacher of several per iteration", least=2, most=None)

register_method("fadrm", FADRM)
register_method("fadrm_fd2", with_fd2(FADRM))
register_method("fadrm+", FADRM_PLUS)
register_method("fadrm+_fd2", with_fd2(FADRM_PLUS))
