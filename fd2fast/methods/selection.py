"""The selection baselines: real images or crops of them."""

from fd2fast.methods.method import Selection
from fd2fast.methods.registry import register_method

register_method("random", Selection("real images drawn at random"))
register_method("herding", Selection("real images whose mean feature is nearest the class's"))
register_method("kcenter", Selection("real images that cover the class's features"))
register_method("rded", Selection("2 x 2 mosaics of the crops that the teacher recognises best", patch_factor=2))
