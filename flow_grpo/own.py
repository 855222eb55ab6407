"""What a user names as module:attribute instead of something of ours."""

import os
import sys
from pkgutil import resolve_name
from typing import Any


def load(name: str, what: str, kind: str) -> Any:
    """Import "module:attribute", maybe from the current folder, or raise ValueError.

    what: how the error names it. kind: of attribute that is needed.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return resolve_name(name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"{what} can't be imported ({type(error).__name__}: {error}). An importable module and "
            f"a {kind} in it are needed, as module:{kind}."
        ) from error
