"""`python -m finetune_cli` and the console script `finetune`."""

import sys

from finetune_cli import signals, streams
from finetune_cli.errors import Interrupted


def main() -> None:
    """Run the command line."""
    streams.prepare()
    signals.catch()  # before the first import that takes time
    try:
        from finetune_cli.cli.app import app

        app()
    except Interrupted as exc:
        sys.stderr.write(f"error: {exc.problem}\n")
        sys.exit(exc.exit_code)
    except OSError as exc:  # of --help and --version; commands translate theirs
        error = streams.translated(exc)
        if error is None:
            raise
        sys.stderr.write(f"error: {error.problem}\ntry: {error.remedy}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
