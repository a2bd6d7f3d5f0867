"""Names of classes, where something that the export can read knows them: pipelines then take words as well as numbers."""

from __future__ import annotations

from dydit_cli.checkpoints.builtin import PREFIX
from dydit_cli.export.lineage import Lineage

FASHION_MNIST: tuple[str, ...] = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_MNIST_DATA = ("fashion-mnist-subset", "moving-fashion-mnist")


def class_names(lineage: Lineage, num_classes: int) -> tuple[str, ...]:
    """Return the classes' names by label, or nothing if nobody knows them.

    Image folders tell theirs to the manifest of the model that was trained on them; the shipped base models and the shipped data
    are Fashion-MNIST.
    """
    shipped = lineage.base is not None and lineage.base.startswith(PREFIX)
    if lineage.data in FASHION_MNIST_DATA or (shipped and lineage.data is None):
        names = FASHION_MNIST
    else:
        names = lineage.classes
    return names if len(names) == num_classes else ()
