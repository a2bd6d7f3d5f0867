"""Options that several commands take, declared once, so that they read alike wherever they stand.

Those that look the same everywhere are types of parameters. Those that each command puts into a panel of its own are called in
an annotation: `Annotated[str | None, options.device(rich_help_panel=MODEL)]`. A stage's options are None where they are not
given, and the default that their help shows is the schema's; see `stage`. An option of one command, or with a sense of its own
there, stays with its command.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dydit_cli.cli import completing

RecipeArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE | KEY=VALUE",
        help="A recipe (a YAML file or a built-in name) and changes to it; both may be left out.",
        show_default=False,
        autocompletion=completing.recipes,
    ),
]
"""The positional arguments of a stage command; the parameter must be called ``arguments``."""

AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout; all else goes to stderr.")
]
"""The option of every command; its parameter is called ``json``."""

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Say what would be read, written and needed, after every check; do nothing."
    ),
]
"""Of stages whose work can be foreseen; its parameter is called ``dry_run``."""

Out = Annotated[Path | None, typer.Option(help="Folder to write.")]
"""Where a stage writes, if it always does."""

Overwrite = Annotated[
    bool | None,
    typer.Option(
        "--overwrite/--no-overwrite", help="Replace an existing folder.", show_default="no-overwrite"
    ),
]
"""Whether a stage may replace its ``out``."""

Seed = Annotated[int | None, typer.Option(help="Every draw is a function of it.", show_default="0")]
"""The seed of a stage all of whose draws come from it."""

NumHeads = Annotated[
    int | None, typer.Option(help="Attention heads, where the width is not a published one.")
]
"""A hint on a checkpoint, whose shapes do not tell heads from channels."""

NumGroups = Annotated[
    int | None, typer.Option(help="Channel groups of the MLP.", show_default="as many as heads")
]
"""G of the model that a checkpoint becomes."""

AxesDimsRope = Annotated[
    str | None,
    typer.Option(
        help="FLUX: rotary axes of a head, where heads have other than 128 channels.",
        metavar="N,N,N",
        show_default="16,56,56",
    ),
]
"""A hint on a FLUX checkpoint."""

device = partial(
    typer.Option,
    help="auto, cpu, cuda, cuda:N or mps.",
    show_default="auto",
    autocompletion=completing.choices("device"),
)
"""Where a stage computes; a str."""

dtype = partial(
    typer.Option,
    help="float32, bfloat16 or float16.",
    show_default="float32",
    autocompletion=completing.among("float32", "bfloat16", "float16"),
)
"""The type of weights and activations; a str."""

execution = partial(
    typer.Option,
    help="compact, dense, or static (the complete model).",
    show_default="compact",
    autocompletion=completing.among("compact", "dense", "static"),
)
"""How masks become arithmetic where a model is sampled; a str."""

token_capacity = partial(
    typer.Option,
    help="Room for this share of the tokens in MLPs (compact), for CUDA: shapes become static.",
    show_default="none, or learned with --graphs",
)
"""How much room compact execution keeps where shapes may not follow the masks; a float."""

keep_bias = partial(
    typer.Option,
    help="Added to router logits: more keeps more; inf keeps everything.",
    show_default="0.0",
)
"""How far router logits are moved where they are thresholded; a float."""

budget = partial(
    typer.Option, help="Ratio to run at, of a model trained for a range of them.", show_default="as trained"
)
"""What a model with budgets is told; a float."""

classes = partial(typer.Option, help="Labels, used in turn.", metavar="N,N,…", show_default="all in turn")
"""The conditions of a sampled model; a str."""

image_seed = partial(typer.Option, help="Image i depends on the seed and i alone.", show_default="0")
"""The seed of images that are drawn; an int."""

batch_size = partial(typer.Option, help="Images in one forward.", show_default="32")
"""Of images that are drawn or judged; an int."""

processes = partial(typer.Option, help="Processes that share the images, a GPU each.", show_default="1")
"""See `launched`; an int."""
