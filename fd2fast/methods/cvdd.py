"""CV-DD: two teachers for each image, their losses weighted by their accuracy."""

from fd2fast.methods.fd2 import with_fd2
from fd2fast.methods.method import Method
from fd2fast.methods.registry import register_method

FIELDS = {
    "init": "patches",
    "sizes": (224,),
    "residual": 1.0,
    "teacher_schedule": "all",
    "teacher_weights": "prior",
    "teachers_per_image": 2,
    "augment": True,
}
PAPER = {"lr": 0.25, "r_bn": 0.01, "iterations": (4000,), "save_format": "png"}
RELEASED = {"lr": 1e-3, "r_bn": 1e-3, "iterations": (4000,), "save_format": "jpg"}

CVDD = Method(
    "two teachers for each image, weighted by accuracy",
    FIELDS,
    PAPER,
    RELEASED,
    least=2,
    most=None,
    released_on={"cub": {"iterations": (10000,)}},
)

register_method("cvdd", CVDD)
register_method("cvdd_fd2", with_fd2(CVDD))
