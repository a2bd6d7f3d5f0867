"""The names of a diffusion model's tensors, without what other programs put in front of them or keep beside them."""

from __future__ import annotations

from collections.abc import Iterable

# What DDP, torch.compile and ComfyUI put in front of every key.
PREFIXES = ("module.", "_orig_mod.", "model.diffusion_model.", "diffusion_model.")

# In an all-in-one file (ComfyUI's, Forge's) the diffusion model stands beside text encoders and the VAE under one of these.
PARTS = ("model.diffusion_model.",)


def plain_names(keys: Iterable[str]) -> dict[str, str]:
    """The diffusion model's tensors: name without prefixes -> the key in the file, in the file's order.

    Where some keys have the prefix of all-in-one files and others have not, the others are another model's and are left out;
    a prefix that every key has goes, and so does the next.
    """
    names = {key: key for key in keys}
    for part in PARTS:
        inside = {name: key for name, key in names.items() if name.startswith(part)}
        names = inside or names
    changed = True
    while changed and names:
        changed = False
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in names):
                names = {name.removeprefix(prefix): key for name, key in names.items()}
                changed = True
    return names
