"""Model files from strangers, with whatever hashes they like: refused in a line, never a crash.

The OpenVINO form of a run is loaded here, in child processes (`ir_child.py`). Weight files, `.keras` files, manifests
and YAML have their cases in the tests of the modules that read them.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import PROGRAMS, SOURCE

from finetune_cli.errors import RunError
from finetune_cli.untrusted.openvino_ir import read_files

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the children are forked")

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def child(*arguments: object) -> str:
    command = [sys.executable, PROGRAMS / "ir_child.py", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    child("seed", folder)
    return folder


@pytest.fixture
def good(seeds):
    """The XML text and the weights of a good model."""
    return (seeds / "seed.xml").read_text("utf-8"), (seeds / "seed.bin").read_bytes()


class Cases:
    """Files to be loaded together: starting OpenVINO takes longer than loading fifty of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, xml: str | bytes, weights: bytes) -> None:
        (self.folder / name).mkdir()
        (self.folder / name / "model.xml").write_bytes(xml if isinstance(xml, bytes) else xml.encode())
        (self.folder / name / "model.bin").write_bytes(weights)

    def load(self) -> dict[str, str]:
        """Name -> outcome; checks that nothing crashed, hung or was reported in more than a line."""
        outcomes = {}
        for line in child("load", self.folder).splitlines():
            case = json.loads(line)
            assert case["outcome"] in {"answered", "refused"}, case
            assert case["seconds"] < 5, case
            if case["outcome"] == "refused":
                assert len(case["text"].splitlines()) == 1, case
                assert "model" in case["text"], case
            outcomes[case["name"]] = case["outcome"]
        assert len(outcomes) == len(list(self.folder.iterdir()))
        return outcomes


@pytest.fixture
def cases(tmp_path, record_property):
    made = Cases(tmp_path)
    yield made
    record_property("tries", len(list(tmp_path.iterdir())))


def words(text: str) -> list[str]:
    return text.split()


def changed(text: str, pattern: str, replacement: str) -> str:
    new, count = re.subn(pattern, replacement, text, count=1, flags=re.DOTALL)
    assert count == 1, f"no {pattern} in the model"
    return new


def test_a_good_model_answers(cases, good):
    cases.add("good", *good)
    assert cases.load() == {"good": "answered"}


def test_truncated_at_every_sixteenth(cases, good):
    xml, weights = good
    for i in range(16):
        cases.add(f"xml {i}", xml[: len(xml) * i // 16], weights)
        cases.add(f"bin {i}", xml, weights[: len(weights) * i // 16])
    assert set(cases.load().values()) == {"refused"}


def test_flipped_bits_crash_nothing(cases, good):
    """What they change in silence is caught before by the hashes in run.json."""
    xml, weights = good
    rng = random.Random(0)
    for i in range(25):
        for name, content in (("xml", xml.encode()), ("bin", weights)):
            bit = rng.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            cases.add(f"{name} {i}", *((bytes(flipped), weights) if name == "xml" else (xml, bytes(flipped))))
    outcomes = cases.load()
    assert {"answered", "refused"} == set(outcomes.values())


CONSTANT = r'(element_type=")f32(" shape=")8, 3, 3, 3(" offset=")32(" size=")864(")'


def test_constants_outside_the_weights(cases, good):
    xml, weights = good
    assert re.search(CONSTANT, xml)
    changes = {
        "beyond the end": r"\1f32\g<2>8, 3, 3, 3\g<3>100000\g<4>864\5",
        "one byte beyond": rf"\1f32\g<2>8, 3, 3, 3\g<3>{len(weights) - 863}\g<4>864\5",
        "before the start": r"\1f32\g<2>8, 3, 3, 3\g<3>-32\g<4>864\5",
        "wrapping around": r"\1f32\g<2>8, 3, 3, 3\g<3>18446744073709551584\g<4>864\5",
        "too long": r"\1f32\g<2>8, 3, 3, 3\g<3>32\g<4>865\5",
        "too short": r"\1f32\g<2>8, 3, 3, 3\g<3>32\g<4>0\5",
        "huge": r"\1f32\g<2>800000, 300, 300, 3\g<3>32\g<4>864000000000\5",
        "shape bomb": r"\1f32\g<2>800000, 300, 300, 3\g<3>32\g<4>864\5",
        "wrapping shape": r"\1f32\g<2>4294967296, 4294967296, 1, 1\g<3>32\g<4>0\5",
        "negative shape": r"\1f32\g<2>-8, -3, 3, 3\g<3>32\g<4>864\5",
        "unicode digits": "\\1f32\\g<2>8, 3, 3, 3\\g<3>\u0663\u0662\\g<4>864\\5",
        "text": r"\1string\g<2>8, 3, 3, 3\g<3>32\g<4>864\5",
        "four bits": r"\1u4\g<2>8, 3, 3, 3\g<3>32\g<4>108\5",
        "no type": r"\1\g<2>8, 3, 3, 3\g<3>32\g<4>864\5",
    }
    for name, replacement in changes.items():
        cases.add(name, changed(xml, CONSTANT, replacement), weights)
    assert cases.load() == dict.fromkeys(changes, "refused")


OPERATIONS = {
    # These four end OpenVINO 2026.4 itself with a segmentation fault.
    "state in the place of the input": ('name="image" type="Parameter"', 'name="image" type="Assign"'),
    "state in the place of a constant": ('type="Const" version="opset1"', 'type="ReadValue" version="opset6"'),
    "an operation without inputs": ('type="Const" version="opset1"', 'type="Broadcast" version="opset1"'),
    "a stride beyond 32 bits": ('dilations="1, 1"', 'dilations="2147483648, 1"'),
    "a loop": ('type="Clamp"', 'type="Loop"'),
    "an extension": ('type="Clamp" version="opset1"', 'type="Clamp" version="extension"'),
    "an unknown operation": ('type="Clamp"', 'type="Clamps"'),
    "an unknown set": ('type="Clamp" version="opset1"', 'type="Clamp" version="opset99"'),
    "two inputs": ('type="Const" version="opset1"', 'type="Parameter" version="opset1"'),
    "no output": ('type="Result"', 'type="Convert"'),
    "another type of photos": ('element_type="f32"', 'element_type="f64"'),
    "a body": ("<data min=", '<body><layers></layers></body><data min='),
    "one number for two layers": ('layer id="1"', 'layer id="0"'),
    "an edge from nowhere": ('from-layer="0" from-port="0"', 'from-layer="77" from-port="0"'),
    "an edge from an input": ('from-layer="0" from-port="0"', 'from-layer="2" from-port="0"'),
    "a circle": ('from-layer="0" from-port="0"', 'from-layer="4" from-port="2"'),
    "an input without edge": ("<edge [^>]*>", ""),
    "a fixed number of photos": ('shape="\\?,16,16,3"', 'shape="1000000000,16,16,3"'),
    "huge photos": ('shape="\\?,16,16,3"', 'shape="?,1600000,1600000,3"'),
    "photos of any size": ('shape="\\?,16,16,3"', 'shape="?,?,?,3"'),
}  # fmt: skip


def test_operations_that_do_not_belong(cases, good):
    xml, weights = good
    for name, (pattern, replacement) in OPERATIONS.items():
        cases.add(name, changed(xml, pattern, replacement), weights)
    assert cases.load() == dict.fromkeys(OPERATIONS, "refused")


def test_models_that_unfold_or_never_end(cases, seeds):
    names = [path.stem for path in seeds.glob("*.xml") if path.stem not in {"seed", "int8"}]
    assert len(names) == 10
    for name in names:
        cases.add(name, (seeds / f"{name}.xml").read_bytes(), (seeds / f"{name}.bin").read_bytes())
    assert cases.load() == dict.fromkeys(names, "refused")


def test_hostile_xml(cases, good):
    xml, weights = good
    body = xml.split("?>", 1)[1].replace('name="seed"', 'name="&a9;"')
    laughs = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10 if i else "a" * 10}">' for i in range(10))
    changes = {
        "billion laughs": f'<?xml version="1.0"?><!DOCTYPE n [{laughs}]>{body}',
        "external entity": f'<?xml version="1.0"?><!DOCTYPE n [<!ENTITY a9 SYSTEM "file:///etc/passwd">]>{body}',
        "external document type": f'<?xml version="1.0"?><!DOCTYPE n SYSTEM "http://127.0.0.1:9/a.dtd">{body}',
        "entity": body,
        "deep": "<net>" * 500_000,
        "deep notes": changed(xml, "<rt_info>", "<rt_info>" + "<a>" * 500_000),
        "wide": changed(xml, "<layers>", "<layers>" + "<layer/>" * 500_000),
        "two sets of edges": changed(xml, "<edges>", "<edges></edges><edges>"),
        "two sets of layers": changed(xml, "<layers>", "<layers></layers><layers>"),
        "two sets of inputs": changed(xml, "<input>", "<input></input><input>"),
        "two of one port": changed(xml, "(<input>\\s*)(<port .*?</port>)", r"\1\2\2"),
        "two of one attribute": changed(xml, '<data min="0"', '<data min="0" min="1"'),
        "a constant without numbers": changed(xml, '(type="Const" version="opset1">\\s*)<data [^>]*>', r"\1"),
        "another root": "<nets></nets>",
        "nothing in it": "<net></net>",
        "no xml": b"\x7fELF" + bytes(1000),
        "utf-16": xml.replace('<?xml version="1.0"?>', "").encode("utf-16"),
    }
    for name, text in changes.items():
        cases.add(name, text, weights)
    assert cases.load() == dict.fromkeys(changes, "refused")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_changes_crash_nothing(cases, good, seed):
    xml, weights = good
    rng = random.Random(seed)
    odd = words("-1 0 1 2 7 255 65536 2147483648 4294967295 9223372036854775807 18446744073709551615 1e308 nan ?")
    kinds = words("Broadcast Tile Reshape Gather Concat Split Interpolate Pad Einsum StridedSlice ShapeOf Convert TopK")
    for i in range(150):
        text = xml
        for _ in range(rng.choice((1, 1, 2, 4))):
            pattern, choices = rng.choice([
                (r'(?<=["> ,])-?\d+(?=["<,])', odd),
                (r'(?<=type=")\w+(?=" version)', kinds),
                (r'(?<=element_type=")\w+', ["f16", "i64", "u8", "boolean", "string", "dynamic", "u1"]),
                (r'(?<=-layer=")\d+|(?<=-port=")\d+', [str(number) for number in range(20)]),
                (r"<edge [^>]*>", re.findall(r"<edge [^>]*>", xml)),
            ])  # fmt: skip
            match = rng.choice(list(re.finditer(pattern, text)))
            text = text[: match.start()] + rng.choice(choices) + text[match.end() :]
        cases.add(str(i), text, weights)
    cases.load()


def test_weights_in_int8_are_allowed(cases, seeds):
    cases.add("int8", (seeds / "int8.xml").read_bytes(), (seeds / "int8.bin").read_bytes())
    assert cases.load() == {"int8": "answered"}


def test_half_precision_is_allowed(seeds, tmp_path):
    script = """
import sys
from pathlib import Path
from finetune_cli.inference import runtimes
ov = runtimes.import_openvino()
seed, half = Path(sys.argv[1]), Path(sys.argv[2])
ov.save_model(runtimes.read_ir(seed), half, compress_to_fp16=True)
assert runtimes.read_ir(half).input(0).partial_shape[0].is_dynamic
"""
    command = [sys.executable, "-c", script, seeds / "seed.xml", tmp_path / "half.xml"]
    subprocess.run(command, env=ENVIRONMENT, check=True)


def test_missing_and_oversized_files(seeds, tmp_path):
    with pytest.raises(RunError, match=r"model\.xml cannot be read: No such file"):
        read_files(tmp_path / "model.xml")
    shutil.copy(seeds / "seed.xml", tmp_path / "model.xml")
    with pytest.raises(RunError, match=r"model\.xml cannot be read: No such file"):
        read_files(tmp_path / "model.xml")
    os.truncate(tmp_path / "model.xml", 10**11)  # sparse: it takes no space
    shutil.copy(seeds / "seed.bin", tmp_path / "model.bin")
    with pytest.raises(RunError, match="it is 100000000000 bytes large"):
        read_files(tmp_path / "model.xml")
