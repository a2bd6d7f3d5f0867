"""Words as a shell takes them: the commands that dydit proposes can be pasted, whatever spaces the paths hold."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import PurePath

_PLAIN_ON_WINDOWS = re.compile(r"[\w\\/:.,=+@~-]+")


def quoted(word: str | PurePath, system: str = os.name) -> str:
    """Return a word as one argument of a command line.

    Args:
        word: A path, a name or any text.
        system: ``posix``, or ``nt`` for Windows, where both shells understand double quotes and neither takes single ones.
    """
    text = str(word)
    if system != "nt":
        return shlex.quote(text)
    # A file name on Windows cannot hold a double quote; in other text it is doubled, as both shells read it.
    return text if _PLAIN_ON_WINDOWS.fullmatch(text) else '"' + text.replace('"', '""') + '"'
