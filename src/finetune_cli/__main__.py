"""`python -m finetune_cli` and the console script `finetune`."""


def main() -> None:
    """Run the command line."""
    from finetune_cli.cli import app

    app()


if __name__ == "__main__":
    main()
