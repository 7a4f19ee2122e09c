"""The methods by name."""

from __future__ import annotations

from collections.abc import Sequence

from fd2fast.errors import UserError, nearest
from fd2fast.methods import fd2
from fd2fast.methods.losses import TERMS, Term
from fd2fast.methods.method import Method, Selection
from fd2fast.settings.recipe import Recipe

# Methods that optimise images.
METHODS: dict[str, Method] = {}
# Methods that select images.
BASELINES: dict[str, Selection] = {}


def register_method(name: str, method: Method | Selection) -> None:
    """Make a method known by its name, everywhere a name is taken. Raises ValueError for a name that is taken or unusable."""
    if not name or name != name.strip() or set(name) & set(":, /\\"):
        raise ValueError(f"a method's name must be one word without ':' and ',' and '/', got {name!r}")
    if name in METHODS or name in BASELINES:
        raise ValueError(f"there is a method {name!r} already")
    if isinstance(method, Method):
        METHODS[name] = method
    else:
        BASELINES[name] = method


def known_names() -> list[str]:
    """Of all methods, those that optimise first."""
    return [*METHODS, *BASELINES]


def check_name(name: str) -> None:
    """UserError, with the nearest known name, unless `name` is a method's."""
    if name not in METHODS and name not in BASELINES:
        raise UserError(f"unknown method {name!r}: {nearest(name, known_names())}")


def method_of(name: str) -> Method:
    """The method that optimises images by this name; UserError where there is none."""
    check_name(name)
    if name not in METHODS:
        raise UserError(f"method {name!r} selects images, it does not optimise them")
    return METHODS[name]


def losses_of(recipe: Recipe) -> tuple[Term, ...]:
    """The terms of the recipe's method, and FD2's where it has them."""
    return (*method_of(recipe.method).losses, *fd2.terms_of(recipe))


def columns_of(recipe: Recipe, terms: Sequence[Term] | None = None) -> tuple[str, ...]:
    """Of the recorded losses: those that all methods have, then the method's further terms; terms: other ones than its own."""
    names = dict.fromkeys(term.name for term in (losses_of(recipe) if terms is None else terms))
    return (*TERMS, *(name for name in names if name not in TERMS))


def takes_committee(name: str) -> bool:
    """Whether the method works with several teachers; all others take one."""
    return name in METHODS and METHODS[name].most != 1


def patch_factor(name: str) -> int | None:
    """Cells along one side of a method's patches (paper: 2 for SRe2L++ and RDED, 1 for FADRM); None: it takes none."""
    return BASELINES[name].patch_factor if name in BASELINES else METHODS[name].patch_factor
