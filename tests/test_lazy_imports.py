"""What each entry point loads: heavy packages come when they are needed, not before."""

import json
import subprocess
import sys

import pytest

HEAVY = {"tensorflow", "keras", "openvino", "scipy", "matplotlib", "cv2", "jinja2", "sklearn"}


def loaded_by(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after `code`."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(answer.stdout.splitlines()[-1]))


def test_the_command_line_loads_nothing_heavy():
    assert not loaded_by("import finetune_cli.cli.app") & (HEAVY | {"pydantic", "numpy", "PIL", "yaml"})


def test_a_wrong_config_loads_nothing_heavy():
    code = """
from pathlib import Path
from finetune_cli.config.load import load_config
from finetune_cli.errors import ConfigError
try:
    load_config(None, ["training.lr=1"])
except ConfigError:
    pass
"""
    assert not loaded_by(code) & (HEAVY | {"numpy"})


@pytest.mark.parametrize("module", ["inference.predict", "evaluation.evaluate", "evaluation.explain"])
def test_answering_needs_no_training_packages(module):
    loaded = loaded_by(f"import finetune_cli.{module}")
    assert not loaded & {"tensorflow", "keras", "scipy", "matplotlib", "cv2", "jinja2"}


def test_openvino_comes_without_its_telemetry():
    code = "from finetune_cli.inference.runtimes import import_openvino; import_openvino()"
    script = f"{code}\nimport sys\nassert sys.modules['openvino_telemetry'] is None"
    assert "openvino" in loaded_by(script)
