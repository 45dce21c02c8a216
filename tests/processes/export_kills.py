"""Ends an export at every one of its steps on the file system; `exports/test_place.py` looks at what is left.

python export_kills.py START WORK exchange|renames    prints how many steps there were
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from exit_injection import count_steps

from finetune_cli.exports import manifest, place
from finetune_cli.exports.openvino import OpenVino

RUN = SimpleNamespace(name="r-2", manifest=SimpleNamespace(files={"model.keras": "cd" * 32}))


def export(folder: Path) -> None:
    with place.placed(folder / "out", force=True) as new:
        (new / "model.xml").write_bytes(b"new")
        manifest.write(new, OpenVino(), RUN)


def main(start: Path, work: Path, way: str) -> int:
    if way == "renames":
        place._exchange = lambda one, other: False
    return count_steps(start, work, export)


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
