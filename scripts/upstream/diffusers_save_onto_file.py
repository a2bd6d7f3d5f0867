"""diffusers: `save_pretrained` to a path where a file lies returns as if it had saved

It logs an error, which a program does not see, and returns None; nothing is written.

dydit: makes the folder first, which raises an error that the command explains (`dydit_cli/artifacts/saving.py`).
"""

import tempfile

from diffusers import AutoencoderKL

with tempfile.NamedTemporaryFile() as file:
    print("returned:", AutoencoderKL(block_out_channels=(32,)).save_pretrained(file.name))
    print("bytes written:", len(file.read()))
