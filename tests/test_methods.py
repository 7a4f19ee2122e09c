"""Methods: what the presets fill in, and what is refused."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from fd2fast.errors import UserError
from fd2fast.methods import (
    BASELINES,
    MAY_STAY_OPEN,
    METHODS,
    TERMS,
    Method,
    Recipe,
    Selection,
    check_name,
    check_teachers,
    columns_of,
    default_jitter,
    filled,
    method_of,
    patch_factor,
    register_method,
    resolve,
    scaled_size,
    takes_committee,
)
from fd2fast.settings.config import DistillConfig, replace
from fd2fast.settings.recipe import recipe_of


def recipe(method: str, size: int = 224, classes: int = 200, dataset: str | None = None, **changes: object) -> Recipe:
    return resolve(replace(DistillConfig(method=method), **changes), classes=classes, size=size, dataset=dataset)


@pytest.mark.parametrize("semantics", ["paper", "released"])
@pytest.mark.parametrize("method", [*METHODS])
def test_nothing_stays_open(method: str, semantics: str) -> None:
    made = recipe(method, semantics=semantics)
    still_open = {f.name for f in dataclasses.fields(made) if getattr(made, f.name) is None}
    assert still_open <= set(MAY_STAY_OPEN)
    assert made.fd2 is method.endswith("_fd2")
    assert resolve(made.config(), classes=200, size=224) == made
    assert filled(DistillConfig(method, semantics), classes=200, size=224) == made.config()


def test_a_recipe_is_the_settings_with_nothing_open() -> None:
    """Same fields in the same order, because manifests record them; None only where it is a meaning."""
    open_hints, closed_hints = typing.get_type_hints(DistillConfig), typing.get_type_hints(Recipe)
    assert list(open_hints) == list(closed_hints)
    alone = {"segments_per_step", "teachers_per_image", "alpha", "ls_threshold", "save_every", "memory_limit"}
    assert set(MAY_STAY_OPEN) == alone
    for name, hint in closed_hints.items():
        if name not in ("method", "semantics"):
            assert hint in (open_hints[name], *typing.get_args(open_hints[name])) or hint | None == open_hints[name], (
                name
            )
    with pytest.raises(ValueError, match="'sre2l\\+\\+' leaves segment_size, iterations, .* open"):
        recipe_of(DistillConfig("sre2l++"))


def test_paper_values() -> None:
    sre2l = recipe("sre2l++_fd2")
    assert (sre2l.iterations, sre2l.lr, sre2l.r_bn, sre2l.sizes) == ((4000,), 0.25, 0.01, (224,))
    assert (sre2l.lam, sre2l.beta, sre2l.group_size, sre2l.prototypes) == (0.8, 0.5, 4, "ema")
    assert (sre2l.prior_view, sre2l.patch_choice, sre2l.save_format, sre2l.quantize) == ("clean", "id", "png", "round")
    assert (sre2l.segment_size, sre2l.jitter, sre2l.ls_threshold, sre2l.keep_base_ce) == (100, 32, None, False)
    fadrm = recipe("fadrm+_fd2")
    assert (fadrm.iterations, fadrm.lr, fadrm.sizes) == ((500,) * 4, 0.25, (200, 224, 200, 224))
    assert (fadrm.residual, fadrm.teacher_schedule) == (0.5, "round_robin")
    cvdd = recipe("cvdd")
    assert (cvdd.teacher_weights, cvdd.teachers_per_image, cvdd.teacher_schedule) == ("prior", 2, "all")


def test_released_values() -> None:
    sre2l = recipe("sre2l++_fd2", semantics="released")
    assert (sre2l.iterations, sre2l.lr, sre2l.r_bn, sre2l.lam) == ((4000,), 1e-3, 1e-3, 0.9)
    assert (sre2l.prototypes, sre2l.prior_view, sre2l.patch_choice) == ("last", "augmented", "random")
    assert (sre2l.save_format, sre2l.quantize, sre2l.ls_threshold) == ("jpg", "truncate", 0.0)
    assert recipe("sre2l++_fd2", semantics="released", dataset="cub").iterations == (10000,)
    fadrm = recipe("fadrm+_fd2", semantics="released", dataset="cub")
    assert (fadrm.iterations, fadrm.lr, fadrm.r_bn) == ((1500, 1500, 1500, 2000), 0.1, 1e-3)


def test_given_values_win() -> None:
    config = recipe("fadrm+_fd2", lr=0.02, lam=0.3, prototypes="last", iterations=(7, 8), sizes=(112, 224))
    assert (config.lr, config.lam, config.prototypes, config.iterations) == (0.02, 0.3, "last", (7, 8))
    assert recipe("sre2l++", fd2=True).fd2 is True


def test_sizes_and_jitter_follow_the_images() -> None:
    assert recipe("fadrm+", size=64).sizes == (64,) * 4
    assert recipe("fadrm+", size=128).sizes == (112, 128, 112, 128)
    assert scaled_size(200, 96) == 88
    assert [default_jitter(s) for s in (32, 64, 144, 224)] == [4, 4, 18, 32]
    assert recipe("sre2l++", classes=10).segment_size == 10


def test_one_number_of_iterations_is_the_whole_budget() -> None:
    assert recipe("fadrm+", iterations=(402,)).iterations == (100,) * 4
    assert recipe("sre2l++", iterations=(402,)).iterations == (402,)
    assert recipe("fadrm+", iterations=(402,), sizes=(224,)).iterations == (402,)
    with pytest.raises(UserError, match="at least 4"):
        recipe("fadrm+", iterations=(3,))


def test_the_readmes_own_method_is_a_method() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "register_method" in code]
    try:
        exec(snippet, {})
        assert columns_of(recipe("sre2l++_smooth")) == (*TERMS, "smooth")
        assert recipe("sre2l++_smooth").lr == recipe("sre2l++").lr
    finally:
        METHODS.pop("sre2l++_smooth", None)


def test_baselines_need_no_presets() -> None:
    for method in BASELINES:
        config = filled(DistillConfig(method, ipc=3), classes=200, size=224)
        assert (config.save_format, config.iterations) == ("png", None)
        with pytest.raises(UserError, match=f"method '{method}' selects images"):
            recipe(method)


def test_a_registered_method_is_known_everywhere() -> None:
    own = Method(
        "mine", {**METHODS["sre2l++"].fields, "sizes": (112, 224)}, {"lr": 0.5}, {"lr": 0.1}, patch_factor=None
    )
    try:
        register_method("mine", own)
        check_name("mine")
        assert method_of("mine") is own
        assert patch_factor("mine") is None
        with pytest.raises(UserError, match="known: .*mine"):
            check_name("yours")
        given = {"iterations": (7, 8), "r_bn": 0.1, "save_format": "png"}
        assert recipe("mine", **given).lr == 0.5
        assert recipe("mine", semantics="released", size=128, **given).sizes == (64, 128)
        with pytest.raises(ValueError, match="there is a method 'mine' already"):
            register_method("mine", Selection("other"))
    finally:
        del METHODS["mine"]
    with pytest.raises(ValueError, match="one word"):
        register_method("two words", own)
    with pytest.raises(ValueError, match="settings that do not exist: learning_rate"):
        Method("wrong", {"learning_rate": 1.0}, {}, {})


def test_patches_and_committees() -> None:
    assert [patch_factor(m) for m in ("sre2l++_fd2", "fadrm", "rded", "random")] == [2, 1, 2, None]
    assert [takes_committee(m) for m in ("sre2l++", "fadrm+_fd2", "cvdd", "rded")] == [False, True, True, False]
    check_teachers(recipe("fadrm+"), 2)
    for method, count, message in (
        ("fadrm+", 1, "at least 2"),
        ("cvdd_fd2", 1, "at least 2"),
        ("sre2l++", 0, "at least 1"),
        ("sre2l++_fd2", 2, "takes 1"),
    ):
        with pytest.raises(UserError, match=message):
            check_teachers(recipe(method), count)
    with pytest.raises(UserError, match="teachers_per_image is 3, but only 2"):
        check_teachers(recipe("cvdd", teachers_per_image=3), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sre2lpp_fd2"}, "did you mean 'sre2l\\+\\+_fd2'"),
        ({"method": "herdin"}, "did you mean 'herding'"),
        ({"semantics": "papers"}, "did you mean 'paper'"),
        ({"init": "patch"}, "distill.init must be patches, real or noise, got 'patch': did you mean 'patches'"),
        ({"precision": "fp8"}, "distill.precision must be auto, fp64, fp32, tf32, bf16 or fp16, got 'fp8'"),
        ({"ipc": 0}, r"ipc must be a whole number of images per class, at least 1, got 0"),
        ({"group_size": 0}, r"group_size must be a whole number of images \(N_S\), at least 1, got 0"),
        ({"lam": 1.2}, r"lam must be a number within \[0, 1\], got 1.2"),
        ({"lam": -0.1}, r"lam must be a number within \[0, 1\], got -0.1"),
        ({"lam": float("nan")}, "lam must be a number within"),
        ({"beta": 2.0}, "beta must be"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"segment_size": 201}, "segment_size must be at most the 200 classes of the data set, got 201"),
        ({"segment_size": 0}, "segment_size must be a whole number of at least 1"),
        ({"segments_per_step": 0}, "segments_per_step must be"),
        ({"iterations": ()}, "iterations must be"),
        ({"iterations": (0,)}, "iterations must be"),
        ({"sizes": (4,)}, r"sizes must be a list of at least one side, each 8 to 32767 pixels"),
        ({"sizes": (112, 224)}, "same number of phases"),
        ({"sizes": (112,)}, "sizes must end with the side of the data set's images, 224"),
        ({"lr": 0.0}, "lr must be a finite number above 0, got 0.0"),
        ({"lr": "fast"}, "lr must be a finite number above 0, got 'fast'"),
        ({"betas": (0.5, 1.0)}, "betas must be"),
        ({"residual": 1.5}, "residual must be"),
        ({"r_bn": -1.0}, "r_bn must be"),
        ({"min_crop": 0.0}, "min_crop must be"),
        ({"jitter": -1}, "jitter must be"),
        ({"save_every": 0}, "save_every must be"),
        ({"seed": -1}, "seed must be"),
        ({"ls_threshold": float("nan")}, "ls_threshold must be"),
        ({"teachers_per_image": 0}, "teachers_per_image must be"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(str(changes.pop("method", "sre2l++_fd2")), **changes)
