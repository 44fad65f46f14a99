"""Registers the checkpoint format with transformers the moment transformers' quantizers are imported.

`import lowrank_kit` must make `from_pretrained` work and must not cost the seconds that importing transformers takes,
or `lowrank --help` would. So the registration waits for the module it registers with.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "transformers.quantizers.auto"


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds TARGET once, by the other finders, and registers after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec of TARGET that loads through this class; None for every other module."""
        if fullname != TARGET or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        self.loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """The module, as the real loader makes it."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()


def register_with_transformers() -> None:
    """Register now if transformers' quantizers are imported, else when they will be."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from lowrank_kit.checkpoint.quantizer import register

    register()
