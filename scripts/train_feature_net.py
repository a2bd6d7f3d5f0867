"""Train the feature network that `dydit evaluate` ships for Fashion-MNIST, and its reference statistics.

    python scripts/train_feature_net.py --source FOLDER

FOLDER holds the four original IDX files. Ten minutes on one CPU core. The network is trained with batch normalisation on the
60,000 training images (mirrored at random, shoes excepted, as the shipped base models were), judged once on the 10,000 test
images, folded, and written as `fashion_features.safetensors`; `fashion_statistics.npz` holds `mu`, `sigma`, `mu_s`, `sigma_s`
and `count` of the training images; `evaluation.json` holds hashes, accuracy and settings. All draws come from one seed: the
same machine, torch and number of threads give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dydit_cli.data.idx import read_idx
from dydit_cli.evaluation.extractors.fashion_network import LAYERS, FashionNetwork, padded

SEED = 0
BATCH = 128
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 5e-4
SHOES = (5, 7, 9)
LEAST_ACCURACY = 0.91
EPS = 1e-5
TARGET = Path(__file__).parent.parent / "dydit_cli" / "assets" / "evaluation"


class TrainedNetwork(nn.Module):
    """`FashionNetwork` with batch normalisation behind each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = FashionNetwork()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, eps=EPS) for width, _ in LAYERS)
        self.dropout = nn.Dropout(0.2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 32, 32) -> logits (B, 10)."""
        for convolution, norm in zip(self.bare.convolutions, self.norms, strict=True):
            images = F.relu(norm(convolution(images)))
        logits: Tensor = self.bare.classifier(self.dropout(images.mean(dim=(2, 3))))
        return logits

    @torch.no_grad()
    def folded(self) -> FashionNetwork:
        """The same function of an image without normalisation."""
        folded = FashionNetwork()
        folded.load_state_dict(self.bare.state_dict())
        for convolution, norm in zip(folded.convolutions, self.norms, strict=True):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            convolution.weight.mul_(scale[:, None, None, None])
            convolution.bias.sub_(norm.running_mean).mul_(scale).add_(norm.bias)
        return folded.eval()


def read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28) and labels (n,) of one part."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def mirrored(images: Tensor, labels: Tensor) -> Tensor:
    """Mirror half of the images that are no shoes."""
    flip = (torch.rand(len(images)) < 0.5) & ~torch.isin(labels, torch.tensor(SHOES))
    return torch.where(flip[:, None, None], images.flip(-1), images)


def train(images: Tensor, labels: Tensor, epochs: int) -> FashionNetwork:
    """Train and fold."""
    torch.manual_seed(SEED)
    network = TrainedNetwork().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LEARNING_RATE, steps, pct_start=0.2)
    started, step = time.perf_counter(), 0
    for epoch in range(epochs):
        for picks in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            batch = padded(mirrored(images[picks], labels[picks]))
            loss = F.cross_entropy(network(batch), labels[picks])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            step += 1
            if step % 100 == 0:
                seconds = time.perf_counter() - started
                print(
                    f"epoch {epoch + 1}, step {step} of {steps}, loss {loss:.3f}, {seconds:.0f} s", flush=True
                )
    network.eval()
    folded = network.folded()
    with torch.no_grad():
        probe = padded(images[:64])
        torch.testing.assert_close(folded(probe)[2], network(probe), rtol=1e-3, atol=1e-3)
    return folded


@torch.no_grad()
def features(network: FashionNetwork, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled and spatial features and logits of all images."""
    parts = [network(padded(batch)) for batch in images.split(500)]
    pooled, spatial, logits = (torch.cat(column) for column in zip(*parts, strict=True))
    return pooled, spatial, logits


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance in fp64."""
    return values.double().mean(dim=0), torch.cov(values.double().T)


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Parse the arguments, train, judge and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument(
        "--target", type=Path, default=TARGET, help="folder to write (default: the package's)"
    )
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    images, labels = read(arguments.source, "train")
    network = train(images, labels, arguments.epochs)
    test_images, test_labels = read(arguments.source, "t10k")
    logits = features(network, test_images)[2]
    accuracy = float((logits.argmax(dim=1) == test_labels).double().mean())
    print(f"accuracy on {len(test_labels)} test images: {accuracy:.4f}")
    if accuracy < LEAST_ACCURACY:
        raise SystemExit(f"below {LEAST_ACCURACY}: nothing is written; train for more --epochs")
    arguments.target.mkdir(parents=True, exist_ok=True)
    weights = arguments.target / "fashion_features.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, weights)
    # safetensors makes its files private.
    weights.chmod(0o644)
    pooled, spatial, _ = features(network, images)
    (mu, sigma), (mu_s, sigma_s) = moments(pooled), moments(spatial)
    statistics = arguments.target / "fashion_statistics.npz"
    # The spatial covariance in fp32: it is large, and rounding it moves the distance by less than a millionth.
    np.savez_compressed(
        statistics,
        mu=mu.numpy(),
        sigma=sigma.numpy(),
        mu_s=mu_s.numpy(),
        sigma_s=sigma_s.float().numpy(),
        count=np.int64(len(images)),
    )
    record = {
        "weights": {"file": weights.name, "sha256": sha256(weights)},
        "statistics": {"file": statistics.name, "sha256": sha256(statistics), "images": len(images)},
        "test_accuracy": accuracy,
        "test_images": len(test_labels),
        "training": {"epochs": arguments.epochs, "batch": BATCH, "seed": SEED, "torch": torch.__version__},
        "data": {path.name: sha256(path) for path in sorted(arguments.source.glob("*ubyte.gz"))},
    }
    (arguments.target / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(
        f"{weights}: {weights.stat().st_size / 1e6:.2f} MB; {statistics}: {statistics.stat().st_size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
