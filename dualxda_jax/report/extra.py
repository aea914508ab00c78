"""The libraries that only a report needs."""

import importlib


def need(*modules: str) -> None:
    """Check that optional libraries are there.

    Args:
        modules: their import names.

    Raises:
        ImportError: names the missing one and the extra that brings it.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f'a report needs {module}, which is not installed: pip install "dualxda-jax[report]"', name=module
            ) from error
