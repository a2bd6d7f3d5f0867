"""A user's own rankings, width routers and baselines, from a Python file that the user names: `dydit --plugin FILE …`.

A plug-in is the user's code and runs as such; it is loaded where a person asks for it, on the command line or by `load_plugin`, and never
because a recipe, a checkpoint or an artifact says so. What is made with it records its name and hash.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

from dydit_cli.conversion.importance import PLUGGED_RANKINGS, RANKINGS, Ranking
from dydit_cli.dynamic.routers import WIDTHS, ChannelRouter, HeadRouter
from dydit_cli.errors import DyditError
from dydit_cli.plugged import IN_USE, PluginFile, provider_of
from dydit_cli.training.deciding import DECIDING, Deciding

REGISTER = "register"


@dataclass
class Plugin:
    """What a plug-in's `register` is handed: it adds to the package by name.

    Attributes:
        file: The plug-in.
    """

    file: PluginFile
    _provides: list[str] = field(default_factory=list)

    def add_width(self, name: str, heads: type[HeadRouter], groups: type[ChannelRouter]) -> None:
        """Add width routers, for ``convert`` with ``width: NAME``.

        They read the timestep embedding alone, as everything that plans a schedule relies on, and have a row a unit, the
        always-on one left out; see `WidthRouter` for what else they provide.
        """
        self._claim("width", name, name in WIDTHS)
        if not (issubclass(heads, HeadRouter) and issubclass(groups, ChannelRouter)):
            raise TypeError("width routers are subclasses of HeadRouter and ChannelRouter")
        WIDTHS[name] = (heads, groups)

    def add_ranking(self, name: str, ranking: Ranking) -> None:
        """Add a ranking of heads and channels, for ``convert`` with ``importance: NAME``."""
        self._claim("ranking", name, name in RANKINGS or name in PLUGGED_RANKINGS)
        PLUGGED_RANKINGS[name] = ranking

    def add_routers(self, deciding: Deciding) -> None:
        """Add a baseline, for ``finetune`` with ``routers: NAME``."""
        self._claim("routers", deciding.name, deciding.name in DECIDING)
        DECIDING[deciding.name] = deciding

    def _claim(self, kind: str, name: str, taken: bool) -> None:
        owner = provider_of(kind, name)
        if taken and (owner is None or owner.name != self.file.name):
            raise DyditError(
                f"The plug-in {self.file.name} adds a {kind} called '{name}', which there is already.",
                why=f"It comes from {owner.name if owner else 'dydit itself'}.",
                fix="Give it another name.",
            )
        self._provides.append(f"{kind} {name}")

    @property
    def provides(self) -> tuple[str, ...]:
        """What was added."""
        return tuple(self._provides)


def load_plugin(path: str | Path) -> PluginFile:
    """Run a plug-in, so that its names can be used in this process.

    Args:
        path: A Python file with a function ``register(plugin)``.

    Raises:
        DyditError: If it is not there, fails, or adds what there is already.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DyditError(
            f"There is no plug-in at {path}.",
            why=f"The file cannot be read: {error.strerror or error}.",
            fix="Pass the path of a Python file; docs/plugins.md has an example.",
        ) from error
    file = PluginFile(path.name, hashlib.sha256(content).hexdigest())
    held = IN_USE.get(file.name)
    if held is not None and held.sha256 == file.sha256:
        return held
    plugin = Plugin(file)
    register = getattr(_run(path), REGISTER, None)
    if not callable(register):
        raise DyditError(
            f"The plug-in {path} registers nothing.",
            why=f"It has no function {REGISTER}(plugin).",
            fix="Add one that calls plugin.add_width, add_ranking or add_routers; docs/plugins.md has an example.",
        )
    try:
        register(plugin)
    except DyditError:
        raise
    except Exception as error:
        raise _failed(path, error) from error
    IN_USE[file.name] = replace(file, provides=plugin.provides)
    return IN_USE[file.name]


def _run(path: Path) -> ModuleType:
    """Run the file as a module of its own, which copies and other processes find by name."""
    name = f"dydit_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DyditError(
            f"{path} is not a Python file.",
            why="A plug-in is a file whose name ends in .py.",
            fix="Rename it, or pass another.",
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise _failed(path, error) from error
    return module


def _failed(path: Path, error: Exception) -> DyditError:
    line = error.__traceback__
    while line is not None and line.tb_next is not None:
        line = line.tb_next
    where = f", line {line.tb_lineno} of {Path(line.tb_frame.f_code.co_filename).name}" if line else ""
    return DyditError(
        f"The plug-in {path} fails.",
        why=f"{type(error).__name__}{where}: {error}",
        fix="Correct it; --debug shows the whole traceback.",
    )
