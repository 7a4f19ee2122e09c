"""SRe2L++: one teacher, cross entropy and BN matching from 2 x 2 patches (SRe2L with CV-DD's real initialisation)."""

from fd2fast.methods.fd2 import with_fd2
from fd2fast.methods.method import Method
from fd2fast.methods.registry import register_method

FIELDS = {"init": "patches", "sizes": (224,), "residual": 1.0, "teacher_schedule": "all", "augment": True}
PAPER = {"lr": 0.25, "r_bn": 0.01, "iterations": (4000,), "save_format": "png"}
RELEASED = {"lr": 1e-3, "r_bn": 1e-3, "iterations": (4000,), "save_format": "jpg"}
# the published script's own longer run
RELEASED_ON = {"cub": {"iterations": (10000,)}}

SRE2L = Method("one teacher, 2 x 2 patches", FIELDS, PAPER, RELEASED, released_on=RELEASED_ON)

register_method("sre2l++", SRE2L)
register_method("sre2l++_fd2", with_fd2(SRE2L))
