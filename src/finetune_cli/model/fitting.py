"""The head of one run: from the config's `training` section and the features to weights and a history.

Chooses the solver, weights the rows, and keeps a checkpoint at every epoch of Adam, so that a killed run goes on from
there. L-BFGS takes a second or two and starts again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
