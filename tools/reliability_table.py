"""Run the fault tests and write their numbers into docs/reliability.md, between its markers.

    python tools/reliability_table.py             run the tests, update the tables (about ten minutes on two cores)
    python tools/reliability_table.py REPORT.xml  update the tables from a report of pytest --junit-xml

A test reports its number of tries by `record_property("tries", n)`, or by the number among its parameters; else it
counts as one try.
"""

import ast
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
MODULES = (
    "faults",
    "training.faults",
    "files",
    "runs.checkpoints",
    "cache.features",
    "runs.damaged_runs",
    "untrusted.strangers",
    "untrusted.hostile_files",
    "untrusted.keras_archive",
    "backbones.weights",
    "untrusted.hdf5",
    "runs.manifest",
    "runs.run",
    "config.yaml_file",
    "photos.bad_images",
    "guard",
    "reproducible",
    "training.resume",
)

# A fault, and the tests that try it: package.module::beginning of the test's name.
FAULTS = {
    "SIGKILL at a random moment of `finetune train`, then `--resume`": ["training.faults::test_sigkill"],
    "SIGKILL while a small process saves checkpoints": ["faults::test_sigkill_at_random"],
    "SIGKILL while the feature cache is written": ["faults::test_sigkill_while_the_cache"],
    "SIGKILL while the cache is pruned": ["faults::test_sigkill_while_pruning", "cache.features::test_a_killed_writer"],
    "exit injected at every step of a write": ["files::test_exit_at", "runs.checkpoints::test_exit_at"],
    "SIGINT and SIGTERM, then `--resume`": ["training.faults::test_sigint", "training.faults::test_sigterm"],
    "a second signal": ["training.faults::test_a_second_signal"],
    "more epochs when resumed": ["training.faults::test_more_epochs", "training.faults::test_a_kill_between"],
    "a checkpoint cut at a sixteenth, or missing, or another's": [
        "runs.checkpoints::test_a_file_cut",
        "runs.checkpoints::test_a_missing",
        "runs.checkpoints::test_files_swapped",
        "training.faults::test_when_no_checkpoint",
    ],
    "a bit flipped in a checkpoint": [
        "runs.checkpoints::test_every_flipped",
        "training.faults::test_a_damaged_checkpoint",
    ],
    "a file of an unfinished run cut or with a flipped bit": ["training.faults::test_a_damaged_record"],
    "a file of a finished run cut or with a flipped bit": ["runs.damaged_runs::"],
    "the cache cut, foreign, or damaged while open": [
        "cache.features::test_a_truncated",
        "cache.features::test_a_foreign",
        "cache.features::test_damage_while",
        "cache.features::test_a_damaged_row",
        "cache.features::test_a_row_of_another_type",
    ],
    "a bit flipped in the cache": ["cache.features::test_flipped_bits"],
    "photos, classes, settings, weights or the run to start from changed before the resume": [
        "training.faults::test_other_photos",
        "training.faults::test_other_settings",
        "training.resume::test_a_changed",
        "training.resume::test_other_photos",
        "training.resume::test_other_weights",
    ],
    "the record of the start forged": ["training.resume::test_a_foreign"],
    "photos moved before the resume": ["training.faults::test_photos_may_move"],
    "two processes at once: one name, one run, one cache": [
        "training.faults::test_two",
        "faults::test_two",
        "faults::test_five",
        "cache.features::test_two",
        "cache.features::test_prune_while",
    ],
    "a limit on the size of files (RLIMIT_FSIZE)": ["training.faults::test_a_limit", "faults::test_a_limit"],
    "a full disk (a small tmpfs)": [
        "training.faults::test_a_disk",
        "faults::test_a_full_disk",
        "faults::test_a_cache_that_fills",
        "runs.checkpoints::test_a_full_disk",
        "cache.features::test_a_full_disk",
    ],
    "a folder that may not be written, as a user other than root": [
        "training.faults::test_a_forbidden",
        "faults::test_a_read_only",
    ],
    "one thread against two: files compared": ["reproducible::"],
    "connections, processes and files of train, predict and evaluate": ["guard::test_train", "guard::test_the_default"],
}
HOSTILE = {
    "a run, backbone, weights or config of each hostile kind, its hashes made to fit": ["untrusted.strangers::test_it"],
    "OpenVINO models: operations, shapes, offsets, XML": [
        "untrusted.hostile_files::test_truncated",
        "untrusted.hostile_files::test_constants",
        "untrusted.hostile_files::test_operations",
        "untrusted.hostile_files::test_models",
        "untrusted.hostile_files::test_hostile_xml",
    ],
    "OpenVINO models changed at random (refused, or answered without harm)": [
        "untrusted.hostile_files::test_flipped",
        "untrusted.hostile_files::test_random",
    ],
    "`.keras` files: Lambda, functions, foreign layers, bombs, links": [
        "untrusted.keras_archive::test_only",
        "untrusted.keras_archive::test_a_lambda",
        "untrusted.keras_archive::test_a_layer",
        "untrusted.keras_archive::test_a_function",
        "untrusted.keras_archive::test_a_file",
        "untrusted.keras_archive::test_archives",
        "untrusted.keras_archive::test_members",
        "untrusted.keras_archive::test_descriptions",
        "untrusted.keras_archive::test_links",
        "untrusted.keras_archive::test_every",
    ],
    "weight files: links, external storage, bombs, truncations, NaN": [
        "untrusted.hdf5::test_data_from",
        "untrusted.hdf5::test_a_link",
        "untrusted.hdf5::test_a_shape",
        "untrusted.hdf5::test_values",
        "untrusted.hdf5::test_text_and",
        "untrusted.hdf5::test_a_huge",
        "backbones.weights::test_a_truncated",
        "backbones.weights::test_a_link",
        "backbones.weights::test_groups",
        "backbones.weights::test_a_file_that",
    ],
    "manifests: paths that leave the run, wrong types": ["runs.manifest::"],
    "checkpoints with fitting sums": ["runs.checkpoints::test_a_strangers"],
    "YAML: aliases, tags, depth, size": [
        "config.yaml_file::test_billion",
        "config.yaml_file::test_malformed",
        "config.yaml_file::test_oversized",
        "config.yaml_file::test_duplicate",
    ],
}


@dataclass(frozen=True)
class Outcome:
    """One test that ran: `name` is package.module::test[parameters]."""

    name: str
    state: str
    tries: int
    properties: dict[str, str]


def main(arguments: list[str]) -> int:
    """Update the page; the exit code is 1 if a test failed."""
    if arguments:
        outcomes = list(read(Path(arguments[0])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            modules = [str(test_file(module)) for module in MODULES]
            options = ["-q", "-p", "no:randomly", "--tb=short", "-o", "timeout=1500", "-o", "junit_family=legacy"]
            subprocess.run(
                [sys.executable, "-m", "pytest", *options, f"--junit-xml={report}", *modules], cwd=ROOT, check=False
            )
            outcomes = list(read(report))
    text = PAGE.read_text("utf-8")
    for name, table in tables(outcomes).items():
        marked = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        text, count = marked.subn(lambda _old, new=table: new, text, count=1)
        assert count == 1, f"no marker {name} in {PAGE}"
    PAGE.write_text(text, "utf-8")
    failed = [outcome.name for outcome in outcomes if outcome.state == "failed"]
    print(f"{len(outcomes)} tests, {len(failed)} failed: {' '.join(failed)}")
    return bool(failed)


def test_file(module: str) -> Path:
    """The path of the tests of `package.module` from the root."""
    *folders, name = module.split(".")
    return Path("tests", *folders, f"test_{name}.py")


def read(report: Path) -> Iterator[Outcome]:
    """The outcomes in a report of pytest --junit-xml."""
    for case in ET.parse(report).iter("testcase"):
        module = case.get("classname", "").removeprefix("tests.").replace("test_", "")
        name = case.get("name", "")
        properties = {entry.get("name", ""): entry.get("value", "") for entry in case.iter("property")}
        number = re.search(r"\[(\d+)\]$", name) if "random_moments_loses" in name or "while_the_cache" in name else None
        tries = int(properties.get("tries", number[1] if number else 1))
        failed = case.find("failure") is not None or case.find("error") is not None
        state = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        yield Outcome(f"{module}::{name}", state, tries, properties)


def tables(outcomes: list[Outcome]) -> dict[str, str]:
    """Marker -> Markdown."""
    return {
        "place": f"{machine()}\n",
        "faults": table(("fault", "tries", "survived"), rows(FAULTS, outcomes)),
        "photos": table(("bad files", "tried", "decoded", "refused", "crashed"), photos(outcomes)),
        "hostile": table(("hostile model files", "tried", "refused"), rows(HOSTILE, outcomes)),
    }


def rows(titles: dict[str, list[str]], outcomes: list[Outcome]) -> Iterator[tuple[object, ...]]:
    """Title, tries, and how many of them passed."""
    for title, beginnings in titles.items():
        found = [
            outcome for outcome in outcomes if outcome.name.startswith(tuple(beginnings)) and outcome.state != "skipped"
        ]
        passed = sum(outcome.tries for outcome in found if outcome.state == "passed")
        yield (title, sum(outcome.tries for outcome in found), passed) if found else (title, "not tried here", "")


def photos(outcomes: list[Outcome]) -> Iterator[tuple[object, ...]]:
    """The corpus of bad pictures."""
    for outcome in outcomes:
        if "bad images" in outcome.properties:
            counts = ast.literal_eval(outcome.properties["bad images"])
            decoded, refused = counts.get("decoded", 0), counts.get("refused", 0)
            total = sum(counts.values())
            yield ("Pillow's test images and Go's image suite", total, decoded, refused, total - decoded - refused)


def table(header: tuple[str, ...], lines: Iterable[tuple[object, ...]]) -> str:
    """A Markdown table."""
    head = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    return "\n".join([*head, *(f"| {' | '.join(map(str, line))} |" for line in lines)]) + "\n"


def machine() -> str:
    """The system, Python and processor that the numbers come from."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{platform.system()}, Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores of {model}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
