"""`python -m finetune_cli` and the console script `finetune`."""

import sys

from finetune_cli import signals
from finetune_cli.errors import Interrupted


def main() -> None:
    """Run the command line."""
    signals.catch()  # before the first import that takes time
    try:
        from finetune_cli.cli.main import app

        app()
    except Interrupted as exc:
        sys.stderr.write(f"error: {exc.problem}\n")
        sys.exit(exc.exit_code)


if __name__ == "__main__":
    main()
