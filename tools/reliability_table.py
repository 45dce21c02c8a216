"""Run the fault tests and write their numbers into docs/reliability.md, between its markers.

    python tools/reliability_table.py             run the tests, renew the tables (about ten minutes on two cores)
    python tools/reliability_table.py REPORT.xml  renew the tables from what pytest wrote with --junit-xml

A test tells how often it tried by `record_property("tries", n)`; where it does not, by the number among its parameters;
else it counts as one try.
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
    "faults", "faults_train", "files", "checkpoints", "cache", "damaged_runs", "strangers", "hostile_files",
    "keras_file", "weights", "hdf5", "run", "config", "bad_images", "guard", "reproducible", "beginning",
)  # fmt: skip

# A fault, and the tests that try it: module::beginning of the test's name.
FAULTS = {
    "SIGKILL at a random moment of `finetune train`, then `--resume`": ["faults_train::test_sigkill"],
    "SIGKILL while a small process saves checkpoints": ["faults::test_sigkill_at_random"],
    "SIGKILL while the feature cache is written": ["faults::test_sigkill_while_the_cache"],
    "SIGKILL while the cache is pruned": ["faults::test_sigkill_while_pruning", "cache::test_a_killed_writer"],
    "exit injected at every step of a write": ["files::test_exit_at", "checkpoints::test_exit_at"],
    "SIGINT and SIGTERM, then `--resume`": ["faults_train::test_sigint", "faults_train::test_sigterm"],
    "a second signal": ["faults_train::test_a_second_signal"],
    "more epochs when resumed": ["faults_train::test_more_epochs", "faults_train::test_a_kill_between"],
    "a checkpoint cut at a sixteenth, or missing, or another's": [
        "checkpoints::test_a_file_cut", "checkpoints::test_a_missing", "checkpoints::test_files_swapped",
        "faults_train::test_when_no_checkpoint",
    ],
    "a bit flipped in a checkpoint": ["checkpoints::test_every_flipped", "faults_train::test_a_damaged_checkpoint"],
    "a file of an unfinished run cut or with a flipped bit": ["faults_train::test_a_damaged_beginning"],
    "a file of a finished run cut or with a flipped bit": ["damaged_runs::"],
    "the cache cut, foreign, or damaged while open": [
        "cache::test_a_truncated", "cache::test_a_foreign", "cache::test_damage_while", "cache::test_a_damaged_row",
        "cache::test_a_row_of_another_type",
    ],
    "a bit flipped in the cache": ["cache::test_flipped_bits"],
    "photos, classes, settings, weights or the run to start from changed before the resume": [
        "faults_train::test_other_photos", "faults_train::test_other_settings", "beginning::test_a_changed",
        "beginning::test_other_photos", "beginning::test_other_weights",
    ],
    "the record of a beginning forged": ["beginning::test_a_foreign"],
    "photos moved before the resume": ["faults_train::test_photos_may_move"],
    "two processes at once: one name, one run, one cache": [
        "faults_train::test_two", "faults::test_two", "faults::test_five", "cache::test_two", "cache::test_prune_while",
    ],
    "a limit on the size of files (RLIMIT_FSIZE)": ["faults_train::test_a_limit", "faults::test_a_limit"],
    "a full disk (a small tmpfs)": [
        "faults_train::test_a_disk", "faults::test_a_full_disk", "faults::test_a_cache_that_fills",
        "checkpoints::test_a_full_disk", "cache::test_a_full_disk",
    ],
    "a folder that may not be written, as a user other than root": [
        "faults_train::test_a_forbidden", "faults::test_a_read_only",
    ],
    "one thread against two: files compared": ["reproducible::"],
    "connections, processes and files of train, predict and evaluate": ["guard::test_train", "guard::test_the_default"],
}  # fmt: skip
HOSTILE = {
    "a run, backbone, weights or config of each hostile kind, its hashes made to fit": ["strangers::test_it"],
    "OpenVINO models: operations, shapes, offsets, XML": [
        "hostile_files::test_truncated", "hostile_files::test_constants", "hostile_files::test_operations",
        "hostile_files::test_models", "hostile_files::test_hostile_xml",
    ],
    "OpenVINO models changed at random (refused, or answered without harm)": [
        "hostile_files::test_flipped", "hostile_files::test_random",
    ],
    "`.keras` files: Lambda, functions, foreign layers, bombs, links": [
        "keras_file::test_only", "keras_file::test_a_lambda", "keras_file::test_a_layer", "keras_file::test_a_function",
        "keras_file::test_a_file", "keras_file::test_archives", "keras_file::test_members",
        "keras_file::test_descriptions", "keras_file::test_links", "keras_file::test_every",
    ],
    "weight files: links, external storage, bombs, truncations, NaN": [
        "hdf5::test_data_from", "hdf5::test_a_link", "hdf5::test_a_shape", "hdf5::test_values", "hdf5::test_text_and",
        "hdf5::test_a_huge", "weights::test_a_truncated", "weights::test_a_link", "weights::test_groups",
        "weights::test_a_file_that",
    ],
    "manifests: paths that leave the run, wrong types": ["run::test_a_manifest", "run::test_a_broken"],
    "checkpoints with fitting sums": ["checkpoints::test_a_strangers"],
    "YAML: aliases, tags, depth, size": [
        "config::test_billion", "config::test_malformed", "config::test_oversized", "config::test_duplicate",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One test that ran: `name` is module::test[parameters]."""

    name: str
    state: str
    tries: int
    properties: dict[str, str]


def main(arguments: list[str]) -> int:
    """Renew the page; the exit code is 1 when a test failed."""
    if arguments:
        outcomes = list(read(Path(arguments[0])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            modules = [f"tests/test_{name}.py" for name in MODULES]
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
    failed = [each.name for each in outcomes if each.state == "failed"]
    print(f"{len(outcomes)} tests, {len(failed)} failed: {' '.join(failed)}")
    return bool(failed)


def read(report: Path) -> Iterator[Outcome]:
    """The outcomes in what pytest wrote with --junit-xml."""
    for case in ET.parse(report).iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2].removeprefix("test_")
        name = case.get("name", "")
        properties = {each.get("name", ""): each.get("value", "") for each in case.iter("property")}
        number = re.search(r"\[(\d+)\]$", name) if "random_moments_loses" in name or "while_the_cache" in name else None
        tries = int(properties.get("tries", number[1] if number else 1))
        failed = case.find("failure") is not None or case.find("error") is not None
        state = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        yield Outcome(f"{module}::{name}", state, tries, properties)


def tables(outcomes: list[Outcome]) -> dict[str, str]:
    """Marker -> Markdown."""
    return {
        "place": f"{place()}\n",
        "faults": table(("fault", "tries", "survived"), rows(FAULTS, outcomes)),
        "photos": table(("bad files", "tried", "decoded", "refused", "crashed"), photos(outcomes)),
        "hostile": table(("hostile model files", "tried", "refused"), rows(HOSTILE, outcomes)),
    }


def rows(titles: dict[str, list[str]], outcomes: list[Outcome]) -> Iterator[tuple[object, ...]]:
    """Title, tries, and how many of them ended well."""
    for title, beginnings in titles.items():
        found = [each for each in outcomes if each.name.startswith(tuple(beginnings)) and each.state != "skipped"]
        well = sum(each.tries for each in found if each.state == "passed")
        yield (title, sum(each.tries for each in found), well) if found else (title, "not tried here", "")


def photos(outcomes: list[Outcome]) -> Iterator[tuple[object, ...]]:
    """The corpus of bad pictures."""
    for each in outcomes:
        if "bad images" in each.properties:
            counts = ast.literal_eval(each.properties["bad images"])
            decoded, refused = counts.get("decoded", 0), counts.get("refused", 0)
            total = sum(counts.values())
            yield ("Pillow's test images and Go's image suite", total, decoded, refused, total - decoded - refused)


def table(header: tuple[str, ...], lines: Iterable[tuple[object, ...]]) -> str:
    """A Markdown table."""
    head = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    return "\n".join([*head, *(f"| {' | '.join(map(str, line))} |" for line in lines)]) + "\n"


def place() -> str:
    """Where the numbers come from."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{platform.system()}, Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores of {model}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
