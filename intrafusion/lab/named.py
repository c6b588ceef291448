"""Functions of one's own that a recipe names: ``package.module:function``."""

from __future__ import annotations

import importlib
from typing import Any

from intrafusion.lab.errors import LabError


def named_function(name: str) -> Any:
    """What is called ``name``; the module is imported.

    Raises:
        LabError: the module cannot be imported, or has nothing of that name.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, ValueError) as error:
        raise LabError(f"'{name}': cannot import '{module}' ({error}); is it installed or on PYTHONPATH?") from None
    except AttributeError:
        raise LabError(f"'{name}': module '{module}' has no '{function}'") from None
