"""The converter's command, called in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from converters.cli import app


def call(*arguments: object) -> Result:
    """Run the app here; what goes wrong is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
