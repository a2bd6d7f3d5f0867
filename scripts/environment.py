"""Makes the project's own environment, `.venv`, when it is missing or out of date; shared by demo, test and check.

It needs nothing but the standard library, and parses on any Python 3.7 so that an old one gets a message and not a traceback.
What it installs is `pip install -c constraints.txt -e .`, with `[dev]` for the tests. A stamp inside the environment remembers
what was installed, so that the second call costs nothing.

    python scripts/environment.py [--dev]      makes the environment and prints the path of its Python

Choices are made from outside:
    DYDIT_PYTHON=PATH     the Python to make the environment with (read by the shell scripts)
    DYDIT_USE_CURRENT=1   use the running Python and its packages as they are; make and install nothing
    a `.venv` of your own is kept and completed, and a torch that it sees is left as it is
    pip's own settings (an index, a proxy, a folder of wheels) apply as always
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
# The packages with a CPU build of torch take 1.3 GB, and pip unpacks the largest of them twice on the way.
FREE_BYTES_NEEDED = 2_500_000_000


class SetupError(Exception):
    """Something the user has to change, in the three parts that every error of this project has."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what}\n  why: {why}\n  fix: {fix}")


@dataclasses.dataclass(frozen=True)
class Stamp:
    """What an environment holds: `fingerprint` is empty while an installation is under way or was broken off."""

    fingerprint: str = ""
    extras: tuple[str, ...] = ()
    kept_torch: str = ""

    @classmethod
    def read(cls, path: Path) -> Stamp | None:
        """The stamp at `path`, or None where there is none that can be read."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(fields["fingerprint"], tuple(fields["extras"]), fields["kept_torch"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def ready(extra: str = "", root: Path = ROOT) -> str:
    """Return the path of a Python that has the project and its packages, making the environment if needed.

    Args:
        extra: An optional group of packages that must be there as well: "" or "dev".
        root: The folder of the project.

    Raises:
        SetupError: If something is missing that the user has to install, choose or free.
    """
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise SetupError(
            f"dydit needs Python 3.11 or newer, this is {platform.python_version()}.",
            f"{sys.executable} was asked to run it.",
            "install a newer Python and call the script with it.",
        )
    if os.environ.get("DYDIT_USE_CURRENT", "") not in ("", "0"):
        _require_packages(extra, root)
        return sys.executable
    folder = root / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp_path = folder / "dydit-environment.json"
    with _one_at_a_time(root):
        if not folder.exists():
            _make(folder, python)
            Stamp().write(stamp_path)
        _require_working(python)
        stamp = Stamp.read(stamp_path) or Stamp(kept_torch=_foreign_torch(python, root))
        wanted = _fingerprint(root)
        if stamp.fingerprint != wanted or (extra and extra not in stamp.extras):
            extras = tuple(sorted({*stamp.extras, extra} - {""}))
            dataclasses.replace(stamp, fingerprint="").write(stamp_path)
            _install(python, extras, stamp.kept_torch, root)
            Stamp(wanted, extras, stamp.kept_torch).write(stamp_path)
    return str(python)


def run(command: Sequence[str], folder: Path | None = None) -> int:
    """Run `command` in `folder` (default: where the user stands) and return its exit code."""
    variables = dict(os.environ)
    if os.environ.get("DYDIT_USE_CURRENT", "") not in ("", "0"):
        # Nothing was installed, so the package is found through its folder.
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH", "")]))
    if os.name == "posix":
        # The command takes this process over, so that Ctrl-C and other signals reach it alone.
        if folder is not None:
            os.chdir(folder)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(command[0], list(command), variables)
    return subprocess.run(list(command), cwd=folder, env=variables).returncode


def leave(main: Callable[[], int]) -> None:
    """Run `main` and leave with its exit code; a SetupError is shown without a traceback, with exit code 2."""
    try:
        sys.exit(main())
    except SetupError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _say(text: str) -> None:
    # Everything goes to stderr: stdout belongs to the command that follows.
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Hold a lock on the project file, so that two calls at once do not install over each other (not on Windows)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(root / "pyproject.toml", "rb") as file:
        # Some network file systems have no locks; there the user has to take turns.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, python: Path) -> None:
    """Make an empty environment, or leave nothing behind."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError as error:
        raise SetupError(
            f"this Python cannot make an environment: {sys.executable} lacks the module {error.name}.",
            "some systems ship it as a package of its own.",
            f"on Debian or Ubuntu: apt install python{version}-venv; or name another Python with DYDIT_PYTHON.",
        ) from error
    free = shutil.disk_usage(folder.parent).free
    if free < FREE_BYTES_NEEDED:
        raise SetupError(
            f"too little disk space for the environment: {free / 1e9:.1f} GB are free in {folder.parent}.",
            f"the packages need about {FREE_BYTES_NEEDED / 1e9:.1f} GB while they are installed, and a torch with CUDA "
            "libraries several more.",
            "free some space, or put the project on a larger disk.",
        )
    _say(f"Making the environment {folder} with Python {platform.python_version()} (once).")
    try:
        venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise SetupError(
            f"the environment {folder} could not be made.",
            f"{error}.",
            "make the folder writable and see that the disk has space, or name another Python with DYDIT_PYTHON.",
        ) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _require_working(python)


def _require_working(python: Path) -> None:
    """Raise unless `python` runs, is new enough, has pip, and is the Python that the user named, if they named one."""
    question = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.run([str(python), "-c", question], capture_output=True, text=True)
        version = answer.stdout.strip() if answer.returncode == 0 else ""
        reason = (answer.stderr.strip().splitlines() or ["it does not run"])[-1]
    except OSError as error:
        version, reason = "", str(error)
    fix = f"delete the folder {python.parent.parent} and run this again."
    if not version:
        raise SetupError("the environment's Python does not work.", f"{python}: {reason}.", fix)
    running = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if tuple(map(int, version.split("."))) < OLDEST_PYTHON:
        raise SetupError(
            f"the environment's Python is {version}, dydit needs 3.11 or newer.",
            f"{python} is there already.",
            fix,
        )
    if os.environ.get("DYDIT_PYTHON") and version != running:
        raise SetupError(
            f"the environment was made with Python {version}, DYDIT_PYTHON names Python {running}.",
            f"{python} is there already.",
            f"unset DYDIT_PYTHON, or {fix}",
        )


def _fingerprint(root: Path) -> str:
    """What an installation depends on: the wanted packages, and the folder that the editable install points to."""
    content = hashlib.sha256(str(root).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        content.update(b"\0" + (root / name).read_bytes())
    return content.hexdigest()


def _foreign_torch(python: Path, root: Path) -> str:
    """The version of a torch that the user put into their own environment, or "" where the tested one will do."""
    question = "from importlib.metadata import version; print(version('torch'))"
    answer = subprocess.run([str(python), "-c", question], capture_output=True, text=True)
    found = answer.stdout.strip() if answer.returncode == 0 else ""
    tested = re.search(
        r"^torch==(\S+)$", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    return "" if tested and found.split("+")[0] == tested.group(1) else found


def _install(python: Path, extras: Sequence[str], kept_torch: str, root: Path) -> None:
    """Install the project with its packages into the environment of `python`, and explain what went wrong, if it did."""
    target = f"{root}[{','.join(extras)}]" if extras else str(root)
    _say(
        f"Installing the packages of constraints.txt{' and the development tools' if extras else ''} (some minutes) ..."
    )
    if kept_torch:
        _say(f"  torch {kept_torch} is there already and stays as it is.")
    elif _cuda_is_likely():
        _say("  No NVIDIA GPU was seen, yet pip may choose a torch with CUDA libraries of several GB;")
        _say("  README, 'Which torch', says how to have a smaller one.")
    constraints = (root / "constraints.txt").read_text(encoding="utf-8")
    if kept_torch:
        constraints = re.sub(r"^torch==\S+$", f"torch=={kept_torch}", constraints, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory(prefix="dydit-setup-") as temporary:
        pinned = Path(temporary) / "constraints.txt"
        pinned.write_text(constraints, encoding="utf-8")
        command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        command += ["--progress-bar", "off", "-c", str(pinned), "-e", target]
        # An environment refuses `pip install --user`, which some users have switched on for good.
        code, output = _watch(command, {**os.environ, "PIP_USER": "0"}, python.parent.parent / "install.log")
    if code != 0:
        raise _explained(output, python.parent.parent / "install.log")


def _cuda_is_likely() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("nvidia-smi") is None


def _watch(command: Sequence[str], variables: dict[str, str], log: Path) -> tuple[int, str]:
    """Run pip; show one line for each package it fetches, keep everything in `log`, return (exit code, output)."""
    # What pip is at, and the downloads that one waits for.
    shown = re.compile(r"Collecting |Installing collected|WARNING: Retrying|ERROR|Downloading .*\d [MG]B")
    lines = []
    process = subprocess.Popen(
        list(command),
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with open(log, "w", encoding="utf-8") as file, process:
        for line in process.stdout or ():
            lines.append(line)
            file.write(line)
            if shown.match(line.strip()):
                _say(f"  pip: {line.strip().split(' (from ')[0][:90]}")
    return process.returncode, "".join(lines)


def _explained(output: str, log: Path) -> SetupError:
    """The error for a failed installation, by what pip said; the network comes first, for it brings the others along."""
    found = [
        re.findall(rf"^\s*({kind}: .*)", output, re.MULTILINE) for kind in ("ERROR", r"\w+Error", "error")
    ]
    last = next((lines[-1].strip() for lines in found if lines), "pip gave no reason.")
    what = "the packages could not be installed."
    causes = (
        (
            r"NewConnectionError|NameResolutionError|name resolution|ConnectTimeout|ReadTimeout|timed out|ProxyError"
            r"|Network is unreachable|Connection (refused|reset|aborted)|SSLError|CERTIFICATE_VERIFY",
            "the package index could not be reached.",
            "connect to the network (or set HTTPS_PROXY, or pip's own settings for an index or a folder of wheels) and "
            "run this again.",
        ),
        (
            r"No space left on device|Errno 28|Disk quota exceeded",
            "the disk is full.",
            "free some space (also in the folder for temporary files, which TMPDIR names) and run this again.",
        ),
        (
            r"No matching distribution found|from versions: none",
            f"a package has no build for Python {platform.python_version()} on {platform.system()} "
            f"{platform.machine()}: {last}",
            "name another Python (3.11 is the tested one) with DYDIT_PYTHON after deleting .venv, or make a .venv of "
            "your own with a torch for your machine and run this again.",
        ),
    )
    for pattern, why, fix in causes:
        if re.search(pattern, output):
            return SetupError(what, why, fix)
    return SetupError(what, last, f"read pip's whole output in {log}, then run this again.")


def _require_packages(extra: str, root: Path) -> None:
    """Raise if the running Python lacks a package that the project asks for, or has one that is too old."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, version

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else [])]
    lacking = []
    try:
        from packaging.requirements import Requirement
    except ImportError:
        lacking = ["packaging"]
    else:
        for requirement in map(Requirement, wanted):
            try:
                if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                    lacking.append(f"{requirement} (found {version(requirement.name)})")
            except PackageNotFoundError:
                lacking.append(str(requirement))
    if lacking:
        raise SetupError(
            f"DYDIT_USE_CURRENT is set, and {sys.executable} lacks packages: {', '.join(lacking)}.",
            "with DYDIT_USE_CURRENT nothing is installed.",
            f"{sys.executable} -m pip install -e '{root}{f'[{extra}]' if extra else ''}', or unset DYDIT_USE_CURRENT.",
        )


def _main() -> int:
    arguments = sys.argv[1:]
    if arguments not in ([], ["--dev"]):
        raise SetupError(
            f"unknown arguments: {' '.join(arguments)}.",
            "this script makes the environment and prints the path of its Python.",
            "call it without arguments, or with --dev for the development tools.",
        )
    print(ready(extra="dev" if arguments else ""))
    return 0


if __name__ == "__main__":
    leave(_main)
