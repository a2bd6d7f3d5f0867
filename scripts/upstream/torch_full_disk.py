"""torch: a full disk is reported without its cause

`torch.save` says where its own writer stumbled. The system's error (no space left) is in no attribute and no text.

dydit: takes these words, and two others that smaller files and a file-size limit give, for a full disk and says so
(`dydit_cli/artifacts/writing.py`).
"""

import torch

try:
    torch.save(torch.zeros(10_000), "/dev/full")
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[0], "| errno:", getattr(error, "errno", None))
