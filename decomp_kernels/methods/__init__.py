"""Every module in this folder but ``base`` is one method.  Importing the package finds them all."""

from importlib import import_module
from pkgutil import iter_modules

from decomp_kernels.methods.base import METHODS

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def methods() -> dict[str, type]:
    """The registry: {"dora": DoRA, ...}, by name."""
    return dict(sorted(METHODS.items()))
