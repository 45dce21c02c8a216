"""Updates the help texts in docs/commands.md between `<!-- help NAME -->` and `<!-- end -->`.

    python tools/update_docs.py

`tests/test_docs.py` compares them with the program.
"""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
BLOCK = re.compile(r"<!-- help (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def help_text(command: str) -> str:
    """What `finetune COMMAND --help` prints on a terminal of 100 columns."""
    from typer.testing import CliRunner

    from finetune_cli.cli.app import app

    answer = CliRunner().invoke(
        app, [command, "--help"], prog_name="finetune", env={"COLUMNS": "100"}, terminal_width=100
    )
    assert answer.exit_code == 0, answer.output
    return "\n".join(line.rstrip() for line in answer.output.strip().splitlines())


def renewed(text: str) -> str:
    """`text` with up-to-date help blocks."""
    return BLOCK.sub(lambda block: f"<!-- help {block[1]} -->\n```text\n{help_text(block[1])}\n```\n<!-- end -->", text)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text("utf-8")), "utf-8")
