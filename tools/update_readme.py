"""Renews the help texts in README.md: what stands between `<!-- help NAME -->` and `<!-- end -->`.

    python tools/update_readme.py

`tests/test_docs.py` compares them, so that the README cannot fall behind.
"""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"<!-- help (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def help_text(command: str) -> str:
    """What `finetune COMMAND --help` prints on a terminal of 100 columns."""
    from typer.testing import CliRunner

    from finetune_cli.cli.main import app

    answer = CliRunner().invoke(
        app, [command, "--help"], prog_name="finetune", env={"COLUMNS": "100"}, terminal_width=100
    )
    assert answer.exit_code == 0, answer.output
    return "\n".join(line.rstrip() for line in answer.output.strip().splitlines())


def renewed(text: str) -> str:
    """`text` with the help blocks as they should be."""
    return BLOCK.sub(lambda block: f"<!-- help {block[1]} -->\n```text\n{help_text(block[1])}\n```\n<!-- end -->", text)


if __name__ == "__main__":
    README.write_text(renewed(README.read_text("utf-8")), "utf-8")
