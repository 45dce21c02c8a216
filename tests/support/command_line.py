"""The command line in this process."""

from typer.testing import CliRunner

from finetune_cli.cli.app import app


def run(*arguments, **options):
    """Run `finetune ARGUMENTS`; returns the result with `exit_code`, `stdout` and `stderr`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="finetune", **options)
