"""Make exported pipelines load after `import dydit_cli`, without flags and without importing torch or diffusers now.

An exported ``model_index.json`` names its transformer as ``["modeling_dydit", CLASS]``, and the file ``modeling_dydit.py`` lies
beside the weights. diffusers looks such a name up in this order (``pipelines/pipeline_loading_utils.py``):

1. as an attribute of the module ``diffusers.pipelines``;
2. as a file in the component's folder, for which it demands ``trust_remote_code=True``;
3. in ``sys.modules``.

Where this package is installed its classes should be used, not code from a folder. So the name becomes an attribute of
``diffusers.pipelines``: at once if that module is there already, else at the moment in which it is imported. The same is done for
the modules that diffusers writes into ``model_index.json`` when a pipeline is saved again.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PIPELINES = "diffusers.pipelines"
MODULE = "modeling_dydit"
"""What exports call their code, on disk and in ``model_index.json``. Exports in the wild record it: it never changes."""

HOMES = {
    "DyDiTTransformer2DModel": "dydit_cli.families.dit",
    "DySiTTransformer2DModel": "dydit_cli.families.sit",
    "DySiTPipelineTransformer2DModel": "dydit_cli.families.sit",
    "DyLatteTransformer3DModel": "dydit_cli.families.latte",
    "DyFluxTransformer2DModel": "dydit_cli.families.flux",
    "PatchAutoencoder": "dydit_cli.pipelines.patch_autoencoder",
    "IdentityAutoencoder": "dydit_cli.export.identity_vae",
}
"""Where the classes that an export can name live in this package. Saved pipelines record these paths: they never change."""


class ExportedClasses(ModuleType):
    """A module that imports a model class when it is asked for."""

    def __getattr__(self, name: str) -> type:
        """Import the class called ``name``."""
        if name not in HOMES:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        found: type = getattr(importlib.import_module(HOMES[name]), name)
        return found


class PipelinesFinder(MetaPathFinder):
    """Waits for `diffusers.pipelines` to be imported, attaches the classes to it and goes."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find `diffusers.pipelines` as everybody else does, and have its loader attach the classes after running it."""
        if fullname != PIPELINES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_attach(module: ModuleType) -> None:
            execute(module)
            # diffusers puts a lazy module in the place of the one that was run.
            attach(sys.modules[PIPELINES])

        spec.loader.exec_module = execute_and_attach  # type: ignore[method-assign]
        return spec


def attach(pipelines: ModuleType) -> None:
    """Give `diffusers.pipelines` an attribute for each module name under which an export's classes are looked up."""
    classes = ExportedClasses(MODULE)
    for name in (MODULE, *HOMES.values()):
        setattr(pipelines, name, classes)


def register() -> None:
    """Attach the classes to `diffusers.pipelines`, now or when it is imported. Calling it again changes nothing."""
    loaded = sys.modules.get(PIPELINES)
    if loaded is not None:
        attach(loaded)
    elif not any(isinstance(finder, PipelinesFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PipelinesFinder())
