"""The command `dualxda`: arguments in, one line out when something is wrong."""

import contextlib
import functools
import inspect
import io
import itertools
import operator
import sys
from collections.abc import Callable, Sequence

from dualxda_jax.cli import commands, programs

COMMANDS: dict[str, Callable[..., None]] = {
    name: getattr(commands, name) for name in ("demo", "fit", "attribute", "explain", "evaluate", "bench", "version")
}

# The others compile nothing, or time it.
KEPT = ("demo", "fit", "attribute", "explain", "evaluate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those after the program's name; None takes them from the command line.

    Returns:
        The exit code: 0, 1 for an error (one line on stderr), 130 when interrupted.
    """
    try:
        _parse(sys.argv[1:] if arguments is None else arguments)()
    except KeyboardInterrupt:
        print("dualxda: interrupted; finished stages are kept and the next run goes on from there", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError, OverflowError, MemoryError) as error:
        print(f"dualxda: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str]) -> Callable[[], None]:
    """Turn arguments into a call; a mistake in them becomes one line."""
    import tyro

    def bind(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
        @functools.wraps(function)
        def bound(*args: object, **kwargs: object) -> Callable[[], None]:
            return functools.partial(function, *args, **kwargs)

        return bound

    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            return tyro.extras.subcommand_cli_from_dict(
                {name: bind(_keeping(f) if name in KEPT else f) for name, f in COMMANDS.items()},
                prog="dualxda",
                description="DualXDA: which training samples made a prediction so, and through which features.",
                args=arguments,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box or rules around a title, then says what is wrong.
        lines = [line.strip(" │╭╮╰╯─-") for line in complaints.getvalue().strip().splitlines()]
        # As many lines as the terminal's width makes of it, up to a rule.
        said = list(itertools.takewhile(bool, itertools.dropwhile(operator.not_, lines[1:])))
        # What is missing stands in the line below "Missing from COMMAND:", and more about it in those that follow.
        said = said[:2] if said and said[0].endswith(":") else said
        raise ValueError((" ".join(said) or "wrong arguments") + " (dualxda --help)") from None


def _keeping(command: Callable[..., None]) -> Callable[..., None]:
    """A command with one argument more: whether compiled programs are kept."""

    def run(*args: object, cache: bool = True, **kwargs: object) -> None:
        with programs.kept(cache):
            command(*args, **kwargs)

    signature = inspect.signature(command)
    last = inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=True, annotation=bool)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), last])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "cache": bool}
    run.__name__, run.__module__ = command.__name__, command.__module__
    # Every command's docstring ends with its arguments.
    run.__doc__ = (
        f"{inspect.getdoc(command)}\n    cache: keep compiled programs in the user's cache folder for the next run; "
        f"{programs.OFF}=1 in the environment turns it off, too."
    )
    return run


def _one_line(error: Exception) -> str:
    if isinstance(error, ImportError) and error.name in ("tyro", "platformdirs"):
        return f'{error.name} is not installed: pip install "dualxda-jax[all]" brings what the command needs'
    return " ".join(str(error).split()) or type(error).__name__
