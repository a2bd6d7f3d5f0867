"""The shipped file: regenerated, compared, run without the package; and what cannot be inlined is refused."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dydit_cli.export import inline as inlining
from dydit_cli.export.inline import ROOTS, CannotInlineError, inline
from dydit_cli.export.registration import HOMES
from tests.export.artifacts import exported, trained

WITHOUT_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dydit_cli":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def test_an_export_ships_what_inlining_makes_now(tmp_path: Path) -> None:
    exported(trained(tmp_path / "t", in_channels=1), tmp_path / "e")
    text = inline()
    for component in ("transformer", "vae"):
        assert (tmp_path / "e" / component / "modeling_dydit.py").read_text(encoding="utf-8") == text
    assert inline() == text


def test_the_file_imports_public_torch_and_diffusers_names_alone() -> None:
    for node in ast.walk(ast.parse(inline())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            assert name == "__future__.annotations" or not any(
                part.startswith("_") for part in name.split(".")
            )
            assert name.split(".")[0] in {"torch", "diffusers", "__future__", *sys.stdlib_module_names}


def test_the_file_runs_without_the_package(tmp_path: Path) -> None:
    file = tmp_path / "alone.py"
    file.write_text(inline(), encoding="utf-8")
    script = f"""{WITHOUT_PACKAGE}
sys.path.insert(0, {str(tmp_path)!r})
import torch, alone
assert sorted(alone.__all__) == {sorted(name for name, home in HOMES.items() if home in ROOTS)!r}
model = alone.DyDiTTransformer2DModel(
    sample_size=8, in_channels=1, hidden_size=24, num_layers=1, num_attention_heads=2, num_classes=3
).eval()
for execution in ("dense", "compact", "static"):
    with torch.no_grad():
        sample = model.set_execution(execution)(torch.zeros(2, 1, 8, 8), 5, torch.tensor([0, 1000])).sample
    assert sample.shape == (2, 2, 8, 8)
try:
    model.set_execution("fast")
except alone.DyditError as error:
    assert error.why
else:
    raise SystemExit("no error")
assert "dydit_cli" not in sys.modules
"""
    subprocess.run([sys.executable, "-I", "-c", script], check=True)


def test_every_module_is_there_once_and_explained() -> None:
    text = inline()
    for root in ROOTS:
        assert text.count(f"------ {root}\n") == 1
    assert "# The paper" not in text.splitlines()[0]
    # Explanations stay: who is asked to trust the code can read it.
    assert "Comparing the fp32 logit with 0" in text


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put modules of a made-up package in the place of the real one's."""

    def arrange(**sources: str) -> None:
        def read(name: str) -> inlining.Module:
            source = sources.get(name.rpartition(".")[2])
            if source is None:
                raise CannotInlineError(f"There is no source of the module {name}.")
            return inlining.Module(name, source, ast.parse(source))

        monkeypatch.setattr(inlining, "_read", read)

    return arrange


def run_inlined(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "inlined"}
    exec(compile(text, "inlined", "exec"), names)
    return names


def test_modules_come_after_what_they_import(package: Any) -> None:
    package(
        top='"""Top."""\nfrom __future__ import annotations\n\nimport math\n\nfrom dydit_cli.low import half\n\nVALUE = half(math.pi)\n',
        low='"""Low.\n\nMore."""\n\nfrom __future__ import annotations\n\n__all__ = ["half"]\n\nTWO = 2\n"""Two."""\n\n\n\n\n'
        "def half(x):\n    # why\n    return x / TWO\n",
    )
    text = inline(["dydit_cli.top"])
    assert round(run_inlined(text)["VALUE"], 2) == 1.57
    assert (
        text.index("# Low.\n#\n# More.")
        < text.index("def half")
        < text.index("# Top.")
        < text.index("VALUE =")
    )
    assert '"""Two."""' in text
    assert "# why" in text
    assert text.count("from __future__") == 1


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"top": "from dydit_cli.low import a\nX = 1\n", "low": "a = 1\nX = 2\n"},
            "'X' is bound by dydit_cli.low",
        ),
        (
            {"top": "from dydit_cli.low import a\nimport math\n", "low": "a = 1\nmath = 2\n"},
            "'math' is bound by",
        ),
        (
            {
                "top": "from dydit_cli.low import a\nfrom math import log\n",
                "low": "from cmath import log\na = 1\n",
            },
            "imports 'log' from",
        ),
        ({"top": "from dydit_cli.low import a as b\n", "low": "a = 1\n"}, "cannot be inlined"),
        ({"top": "import dydit_cli.low\n", "low": "a = 1\n"}, "cannot be inlined"),
        ({"top": "def f():\n    from dydit_cli.low import a\n", "low": "a = 1\n"}, "cannot be inlined"),
        ({"top": "from dydit_cli.low import low\n", "low": "a = 1\n"}, "imports the module low as an object"),
        ({"top": "import numpy\n"}, "may not import numpy"),
        ({"top": "from torch._C import x\n"}, "may not import torch._C.x"),
        ({"top": "if True:\n    a = 1\n"}, "only definitions and assignments"),
        ({"top": 'A = """x\n\n\n\n\ny"""\n'}, "did not survive"),
        ({"top": "from dydit_cli.gone import a\n"}, "no source of the module dydit_cli.gone"),
    ],
)
def test_what_does_not_go_into_one_file_is_refused(
    package: Any, sources: dict[str, str], message: str
) -> None:
    package(**sources)
    with pytest.raises(CannotInlineError, match=message):
        inline(["dydit_cli.top"])
