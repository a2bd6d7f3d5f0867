"""What other libraries say while they are imported, which tells a user of ours nothing.

diffusers imports torchao wherever it is installed, and the three of them remark on each other: libraries for other GPUs that were
not loaded, names that will go. Errors still show.
"""

from __future__ import annotations

import logging

TALKERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao")


def hush() -> None:
    """Raise the level of their loggers; takes effect also on what is imported later."""
    for name in TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
