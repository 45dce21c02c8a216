"""finetune-cli: a folder of photos in, an image classifier that people can trust out.

    import finetune_cli

    run = finetune_cli.train("config.yaml")
    classifier = finetune_cli.load(run)
    print(classifier.predict("photo.jpg").label)

The public names are those of `__all__` and the exceptions in `finetune_cli.errors`. Importing this package imports
nothing heavy; the rest comes when a name is first used (PEP 562).
"""

from typing import TYPE_CHECKING, Any

from finetune_cli import errors
from finetune_cli.errors import FinetuneError

if TYPE_CHECKING:
    from finetune_cli.api import Classifier, Evaluation, Observer, Prediction, Run, load, train
    from finetune_cli.cli.console import Console

__all__ = [
    "Classifier",
    "Console",
    "Evaluation",
    "FinetuneError",
    "Observer",
    "Prediction",
    "Run",
    "__version__",
    "errors",
    "load",
    "train",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A public name that is used for the first time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Console":
        from finetune_cli.cli.console import Console

        return Console
    from finetune_cli import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """The public names, for editors and for `dir`."""
    return sorted(__all__)
