"""Files of prompts: one JSON string a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tidar.errors import TidarError

__all__ = ["read_prompts"]


def read_prompts(path: str) -> Iterator[str]:
    """The prompts of a file, or of standard input (``-``).

    Raises:
        TidarError: a file that cannot be read, or a line that is not a JSON string.
    """
    try:
        text = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise TidarError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(text.splitlines(), 1):
        try:
            prompt = json.loads(line.decode())
        except ValueError:  # bad UTF-8 and bad JSON alike
            prompt = None
        if not isinstance(prompt, str):
            raise TidarError(f'{path}:{number}: not a JSON string; write one prompt a line, such as "def f(x):\\n"')
        yield prompt
