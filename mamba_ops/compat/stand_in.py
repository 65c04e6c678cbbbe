"""The packages mamba_ssm and causal_conv1d by their own names."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from .patch import patch_transformers
from .undo import Undo

# Each package, and the modules at the top level that come with it.
PACKAGES = {"mamba_ssm": ("mamba_ssm", "selective_scan_cuda"), "causal_conv1d": ("causal_conv1d",)}

_installed: dict[str, dict[str, ModuleType]] = {}  # package: the modules that it has displaced


def install(*, replace: bool = True, transformers: bool = True) -> Undo:
    """Makes ``import mamba_ssm`` and ``import causal_conv1d`` mean mamba_ops, with their versions' metadata.

    All modules of a package change at once, never some: names that code has already taken from a real package
    stay what they are, and everything imported from now on is mamba_ops.

    Args:
        replace: whether packages that are really installed are replaced too; else these are left alone.
        transformers: also `patch_transformers`, so that its models equal their own torch path where the
            packages would not (padded batches in training, FalconMamba).

    Returns:
        Puts everything back as it was. Packages that were replaced before stay with their own undo.

    >>> with install(transformers=False):
    ...     from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    >>> selective_scan_fn.__module__
    'mamba_ops.compat.mamba_ssm.ops.selective_scan_interface'
    """
    chosen = [
        package for package in PACKAGES if package not in _installed and (replace or not _is_real(package))
    ]
    for package in chosen:
        _displace(package)
    if chosen and _metadata not in sys.meta_path:
        sys.meta_path.insert(0, _metadata)
    undo_patch = patch_transformers() if transformers else Undo(lambda: None)

    def undo() -> None:
        undo_patch()
        for package in chosen:
            _restore(package)
        if not _installed and _metadata in sys.meta_path:
            sys.meta_path.remove(_metadata)

    return Undo(undo)


def _is_real(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _displace(package: str) -> None:
    _installed[package] = {name: sys.modules.pop(name) for name in _loaded(package)}
    for top in PACKAGES[package]:
        root = f"{__package__}.{top}"
        module = importlib.import_module(root)
        sys.modules[top] = module
        for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"{root}."):
            sys.modules[info.name.removeprefix(f"{__package__}.")] = importlib.import_module(info.name)


def _restore(package: str) -> None:
    displaced = _installed.pop(package)
    for name in _loaded(package):
        del sys.modules[name]
    sys.modules.update(displaced)


def _loaded(package: str) -> list[str]:
    """Names of the package's modules, whoever they belong to."""
    tops = PACKAGES[package]
    return [name for name in sys.modules if name.partition(".")[0] in tops]


class _Metadata(importlib.abc.MetaPathFinder):
    """Finds no modules, but distributions: the versions that importlib.metadata tells of the stand-ins."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        wanted = getattr(context, "name", None)
        for package in _installed:
            if wanted is None or wanted.replace("-", "_").lower() == package:
                yield _Distribution(package)


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, package: str) -> None:
        self.package = package

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            version = sys.modules[self.package].__version__
            return f"Metadata-Version: 2.1\nName: {self.package}\nVersion: {version}\n"
        return f"{self.package}\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{self.package} is a stand-in: it has no files of its own")


_metadata = _Metadata()
