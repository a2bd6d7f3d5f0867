"""Run cells with the project's own commands, once each: what is done is kept under its key, what was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dydit_cli import __version__
from dydit_cli.artifacts import write_json
from dydit_cli.artifacts.manifest import file_hash
from dydit_cli.checkpoints.builtin import PREFIX, builtin_path
from dydit_cli.errors import DyditError
from dydit_cli.recipe.loading import Recipe, load_recipe
from scripts.reproduction.cells import BASE, PRUNED, Cell, Circumstances, key_of, overrides

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RESULT, RATES_FILE = "cell.json", "rates.json"
STAGES = ("convert", "finetune", "evaluate")
PROGRESS_SECONDS, LOG_LINES = 60, 6
COMPUTING = (
    "adapters",
    "artifacts",
    "checkpoints",
    "conversion",
    "data",
    "devices.py",
    "dynamic",
    "evaluation",
    "execution",
    "families",
    "flops.py",
    "objectives",
    "plugged.py",
    "processes",
    "randomness.py",
    "recipe",
    "sampling",
    "training",
)
"""What of the package results come from."""
Say = Callable[[str], None]


class Missing(Exception):
    """Why a cell cannot run yet; a sentence."""


@dataclass(frozen=True)
class Planned:
    """A cell with everything settled that it depends on.

    Attributes:
        cell: Which.
        changed: Overrides of its recipe.
        rate: Learning rate; None for a cell that is not trained.
        key: Of its result.
        folder: Where it lies.
    """

    cell: Cell
    changed: list[str]
    rate: float | None
    key: str
    folder: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """What it gave, if it is done."""
        file = self.folder / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def command(self, stage: str) -> list[str]:
        """The words after ``dydit``."""
        recipe = f"baselines/{'static-control' if self.cell.arm == BASE else self.cell.arm}"
        return [stage, recipe, *self._words(stage), *self._folders(stage)]

    def _words(self, stage: str) -> list[str]:
        own = f"{stage}."
        return [word.removeprefix(own) for word in self.changed if word.startswith(own)]

    def _folders(self, stage: str) -> list[str]:
        return {
            "convert": [f"out={self.folder / 'converted'}"],
            "finetune": [f"model={self.folder / 'converted'}", f"out={self.folder / 'trained'}"],
            "evaluate": [f"model={self.model}", f"out={self.folder / 'evaluation'}"],
        }[stage]

    @property
    def model(self) -> Path:
        """Folder of the model that is measured."""
        return self.folder / ("converted" if self.cell.arm == BASE else "trained")

    @property
    def has_model(self) -> bool:
        """Whether that model is there; a restored cell has a result alone, and one that was stopped a model that is not whole."""
        file = self.model / "manifest.json"
        return file.exists() and (
            self.cell.arm == BASE or bool(_read(file).get("results", {}).get("completed"))
        )

    @property
    def stages(self) -> tuple[str, ...]:
        """What has to run; the base is not trained further."""
        return tuple(stage for stage in STAGES if stage != "finetune" or self.cell.arm != BASE)


def cell_folder(out: Path, name: str, key: str) -> Path:
    """Where a cell of a name and key lies."""
    return out / "cells" / f"{name}-{key[:10]}"


class Runner:
    """Runs cells into a folder.

    Args:
        out: The folder.
        around: What all cells share.
        cells: All of them, of which choices and references are looked up.
        validation: Reference of the choices: an archive of images that nobody trains on.
        say: Told what happens.
        chooses: Whether learning rates come from choices; else from the cells and recipes.

    Attributes:
        chooses: The same.
    """

    def __init__(
        self,
        out: Path,
        around: Circumstances,
        cells: Sequence[Cell],
        validation: Path | None,
        say: Say,
        *,
        chooses: bool,
    ) -> None:
        self.out, self.around, self._cells = out, around, cells
        self._validation, self._say, self.chooses = validation, say, chooses
        # Plans are asked for again and again, and reading a recipe is most of their work.
        self._recipes: dict[tuple[str, ...], Recipe] = {}

    # ------------------------------------------------------------------ planning

    def plan(self, cell: Cell) -> Planned:
        """Settle what a cell depends on.

        Raises:
            Missing: If other cells have to run before, or this version has no such method.
        """
        rate = None if cell.arm == BASE else self._rate(cell)
        changed = overrides(cell, self.around, rate, self._prune(cell))
        if cell.is_validated:
            changed.append(f"evaluate.reference={self._validation}")
        recipe = self._recipe(cell, changed)
        if rate is None and cell.arm != BASE:
            rate = float(recipe.sections["finetune"].model_dump()["learning_rate"])
        # Without what is as the schema has it: a key that is new and left alone makes no other result.
        content = {
            name: section.model_dump(mode="json", exclude_defaults=True)
            for name, section in recipe.sections.items()
        }
        for section in content.values():
            # Where something lies changes nothing; the hashes stand for what lies there.
            for key in ("out", "model", "device", "data", "checkpoint", "reference"):
                section.pop(key, None)
        # A path there, and a switch elsewhere.
        content.get("convert", {}).pop("calibrate", None)
        # What the resolved recipe says, or the hashes do, is not said twice.
        left_out = (
            f"finetune.data={self.around.data}",
            f"convert.data={self.around.data}",
            f"convert.calibrate={self.around.data}",
            "convert.checkpoint=",
            "evaluate.reference=",
            "finetune.learning_rate=",
        )
        named = [word for word in changed if not word.startswith(left_out)]
        key = key_of(cell, self.around, named, content, __version__)
        return Planned(cell, changed, rate, key, cell_folder(self.out, cell.name, key))

    def _recipe(self, cell: Cell, changed: Sequence[str]) -> Recipe:
        name = "static-control" if cell.arm == BASE else cell.arm
        held = (name, *changed)
        if held not in self._recipes:
            try:
                self._recipes[held] = load_recipe(f"baselines/{name}", changed, None)
            except DyditError as error:
                raise Missing(f"{error.what} {error.why}") from error
        return self._recipes[held]

    def _rate(self, cell: Cell) -> float | None:
        if cell.rate is not None or not self.chooses:
            return cell.rate
        # A kind that chooses nothing in its own family follows the DiT's choice.
        family = cell.family if self._rivals(cell.family, cell.kind) else "dit"
        chosen = self.chosen(family, cell.kind)
        if chosen is None:
            raise Missing(
                f"its learning rate is chosen by the cells {family}-{cell.kind}-*-rate*, which have not all run"
            )
        return chosen[0]

    def _rivals(self, family: str, kind: str) -> list[Cell]:
        """The cells by which a learning rate is chosen."""
        return [
            cell
            for cell in self._cells
            if cell.group == "choice" and (cell.family, cell.arm) == (family, kind)
        ]

    def chosen(self, family: str, kind: str) -> tuple[float, dict[float, float]] | None:
        """The learning rate with the least validation distance, and the distances; None until all have run."""
        found = {}
        for rival in self._rivals(family, kind):
            result = self.plan(rival).result
            if result is None:
                return None
            found[float(result["learning_rate"])] = float(result["fd"])
        return (min(found, key=lambda rate: found[rate]), found) if found else None

    def _prune(self, cell: Cell) -> float | None:
        """What a pruned model keeps: as much as the dynamic one of its ratio executes while it samples, routers included."""
        if cell.arm not in PRUNED:
            return None
        if cell.group == "choice":
            return cell.ratio
        twin = next(
            other
            for other in self._cells
            if (other.family, other.arm, other.ratio, other.group, other.variant)
            == (cell.family, "dynamic", cell.ratio, "core", "")
        )
        result = self.plan(twin).result
        if result is None:
            raise Missing(f"it is pruned to the MACs that {twin.name} executes, which has not run")
        return float(result["equal_prune_ratio"])

    # ------------------------------------------------------------------ running

    def run(self, planned: Planned, on_process: Callable[[int], None] = lambda pid: None) -> dict[str, Any]:
        """Run whatever of a cell is not done, and return its result.

        Args:
            planned: The cell.
            on_process: Told the number of every process that is started for it.

        Raises:
            subprocess.CalledProcessError: If a command fails; what it left goes on next time.
        """
        held = planned.result
        if held is not None:
            return held
        fresh = not planned.folder.exists()
        planned.folder.mkdir(parents=True, exist_ok=True)
        seconds, codes = {}, [code_hash()]
        for stage in planned.stages:
            started = time.monotonic()
            self._stage(planned, stage, on_process)
            seconds[stage] = time.monotonic() - started
            codes.append(code_hash())
        # More than one where files were edited while it ran.
        result = self._result(planned, seconds) | {"code": list(dict.fromkeys(codes))}
        write_json(planned.folder / RESULT, result)
        shutil.rmtree(planned.folder / "trained" / "checkpoints", ignore_errors=True)
        if fresh:
            self._learn_price(planned.cell, result)
        return result

    def train(self, planned: Planned, on_process: Callable[[int], None] = lambda pid: None) -> float | None:
        """Make the model of a cell once more, without measuring it: a restored result has none.

        Returns:
            The held-out loss, to be held against the one of the result; None of a base model, which is not trained.

        Raises:
            subprocess.CalledProcessError: If a command fails; what it left goes on next time.
        """
        for stage in planned.stages[:-1]:
            self._stage(planned, stage, on_process)
        shutil.rmtree(planned.folder / "trained" / "checkpoints", ignore_errors=True)
        loss = _read(planned.model / "manifest.json").get("results", {}).get("held_out_loss")
        return None if loss is None else float(loss)

    def _stage(self, planned: Planned, stage: str, on_process: Callable[[int], None]) -> None:
        words = planned.command(stage)
        made = {"convert": "converted", "finetune": "trained", "evaluate": "evaluation"}[stage]
        folder = planned.folder / made
        if (folder / "manifest.json").exists() and stage != "finetune":
            return
        if stage == "finetune" and folder.exists():
            if planned.has_model:
                return
            # A run that ended before its first checkpoint starts again.
            words.append("--resume" if any((folder / "checkpoints").glob("*")) else "--overwrite")
        self._say(f"  dydit {' '.join(words)}")
        metrics = folder / "metrics.jsonl" if stage == "finetune" else None
        self._command(words, planned.folder / "log.txt", metrics, on_process)

    def _command(
        self, words: Sequence[str], log: Path, metrics: Path | None, on_process: Callable[[int], None]
    ) -> None:
        """Run a command whose words go to a log, and say now and then how far it is."""
        command = [sys.executable, "-m", "dydit_cli", *words]
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"$ dydit {' '.join(words)}\n")
            stream.flush()
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=stream, stderr=stream)
            on_process(process.pid)
            try:
                while True:
                    try:
                        code = process.wait(PROGRESS_SECONDS)
                        break
                    except subprocess.TimeoutExpired:
                        if metrics is not None and metrics.exists() and (step := _last_step(metrics)):
                            self._say(f"    step {step}")
            except BaseException:
                # A run that is stopped politely writes a checkpoint first.
                process.terminate()
                process.wait()
                raise
        if code:
            lines = log.read_text(encoding="utf-8").splitlines()
            self._say("\n".join(f"    {line}" for line in lines[-LOG_LINES:]))
            raise subprocess.CalledProcessError(code, command)

    def _result(self, planned: Planned, seconds: dict[str, float]) -> dict[str, Any]:
        cell = planned.cell
        evaluation = _read(planned.folder / "evaluation" / "evaluation.json")
        metrics, cost = evaluation["metrics"], evaluation["cost"]
        frechet = metrics["frechet"]
        trained = {} if cell.arm == BASE else _read(planned.folder / "trained" / "manifest.json")
        reached = trained.get("results", {})
        converted = _read(planned.folder / "converted" / "report.json")
        # A pruned model executes all of itself; what counts is its share of the model that it was cut from.
        share = converted["pruning"]["ratio"] if converted.get("pruning") else 1.0
        ratio = reached.get("ratio")
        return {
            "name": cell.name,
            "family": cell.family,
            "arm": cell.arm,
            "lambda": cell.ratio,
            "seed": cell.seed,
            "group": cell.group,
            "variant": cell.variant,
            "key": planned.key,
            "learning_rate": planned.rate,
            "steps": reached.get("steps", 0),
            "fd": frechet["value"],
            # Half a 95 % interval is 1.96 standard deviations.
            "fd_sampling_std": (frechet["high"] - frechet["low"]) / 2 / 1.96,
            "metrics": metrics,
            "reference": evaluation["reference"],
            "ratio": None if ratio is None else ratio * share,
            "held_out_loss": reached.get("held_out_loss"),
            "trajectory_ratio": cost["ratio"]["value"] * share,
            "gmacs": cost["mmacs"] / 1e3,
            "static_gmacs": cost["static_mmacs"] / 1e3,
            "parameters": cost["parameters"],
            "pruning": converted.get("pruning"),
            "equal_prune_ratio": _equal_prune_ratio(converted, cost) if not cell.is_static else None,
            "seconds": seconds,
            "device": evaluation["device"],
            "versions": evaluation["versions"],
            "commit": trained.get("commit"),
            "commands": ["dydit " + " ".join(planned.command(stage)) for stage in planned.stages],
        }

    # ------------------------------------------------------------------ prices

    def price(self, planned: Planned) -> float | None:
        """Seconds that a cell will take by what earlier ones took on this machine; None before the first."""
        rates = self._rates_of(planned.cell)
        if rates is None:
            return None
        sections = self._recipe(planned.cell, planned.changed).sections
        steps = 0 if planned.cell.arm == BASE else int(sections["finetune"].model_dump()["steps"])
        sampled = self.around.sizes.images * self.around.sizes.sampler_steps
        done = self._steps_done(planned)
        return rates["start"] + rates.get("step", 0.0) * max(0, steps - done) + rates["sampled"] * sampled

    @staticmethod
    def _steps_done(planned: Planned) -> int:
        numbers = [
            int(digits)
            for folder in (planned.folder / "trained" / "checkpoints").glob("*")
            if (digits := "".join(filter(str.isdigit, folder.name)))
        ]
        return max(numbers, default=0)

    def _rates(self) -> dict[str, dict[str, float]]:
        file = self.out / RATES_FILE
        return _read(file) if file.exists() else {}

    def _rates_of(self, cell: Cell) -> dict[str, float] | None:
        """Those of the last cell that is likest: of its family and arm, else of what is static or dynamic as it is, else any."""
        rates = self._rates()
        return next((rates[kind] for kind in _kinds(cell) if kind in rates), None)

    def _learn_price(self, cell: Cell, result: dict[str, Any]) -> None:
        """Remember what a step and a sampled image cost; the last cell of a kind is the best guess for the next."""
        sizes, seconds = self.around.sizes, result["seconds"]
        rates = {
            "sampled": seconds["evaluate"] / (sizes.images * sizes.sampler_steps),
            "start": seconds["convert"],
        }
        if cell.arm != BASE:
            rates["step"] = seconds["finetune"] / result["steps"]
        kinds = [kind for kind in _kinds(cell) if cell.arm != BASE or kind == _kinds(cell)[0]]
        write_json(self.out / RATES_FILE, self._rates() | dict.fromkeys(kinds, rates))


def _kinds(cell: Cell) -> tuple[str, ...]:
    """What a cell's price can be guessed from, the likest first."""
    return f"{cell.family}-{cell.arm}", "static" if cell.is_static else "dynamic", "any"


def code_hash() -> str:
    """Of the code that results come from, as it is now: a version number stays while code is edited."""
    package, found = REPOSITORY / "dydit_cli", hashlib.sha256()
    for name in COMPUTING:
        place = package / name
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            found.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
    return found.hexdigest()[:12]


def _equal_prune_ratio(converted: dict[str, Any], cost: dict[str, Any]) -> float:
    """The share of attention and MLP that a static model keeps at the MACs that were executed; routers count as work."""
    share = 1 - (cost["static_mmacs"] - cost["mmacs"]) / _routed_mmacs(converted["geometry"])
    # A run too short to reach its target may execute everything, and its routers besides.
    return float(min(1.0, share))


def _routed_mmacs(geometry: dict[str, Any]) -> float:
    """Attention and MLP of a complete model, in MMACs (docs/conventions.md gives the formula)."""
    tokens, channels = geometry["num_tokens"], geometry["hidden_size"]
    attention = 4 * tokens * channels**2 + 2 * tokens**2 * channels
    mlp = 2 * tokens * channels * geometry["mlp_hidden"]
    return geometry["depth"] * (attention + mlp) / 1e6


def _last_step(metrics: Path) -> int:
    """Of the last whole line."""
    lines = [line for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def hashes(bases: dict[str, str], data: Path) -> dict[str, str]:
    """Of everything that lies outside a recipe: base checkpoints, data, feature network and reference."""
    assets = REPOSITORY / "dydit_cli" / "assets" / "evaluation"
    found = {"network": file_hash(assets / "fashion_features.safetensors")}
    found["reference"] = file_hash(assets / "fashion_statistics.npz")
    for family, base in bases.items():
        path = builtin_path(base.removeprefix(PREFIX)) if base.startswith(PREFIX) else Path(base)
        found[f"base_{family}"] = file_hash(path)
    for file in sorted(data.glob("*-ubyte*")):
        found[file.name.removesuffix(".gz")] = file_hash(file)
    return found
