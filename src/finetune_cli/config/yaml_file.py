"""YAML text in, plain values and the line of every key out; nothing in a file can run code or use up the memory.

Plain scalars are read by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), without its octal
and hexadecimal numbers: PyYAML's own rules, of YAML 1.1, read ``1e-3`` as text, ``010`` as 8, ``1:30`` as 90 and
``no`` as false. What is neither null, true, false nor a decimal number is text, and so are keys.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_cli import files
from finetune_cli.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_SCALAR = 4096
MAX_DEPTH = 10
_WRITE_ONE = "write a config with: finetune init PHOTOS"
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})")
_FLOAT = re.compile(
    r"[-+]?((0|[1-9][0-9]*)?\.[0-9]+|(0|[1-9][0-9]*)\.?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
Keys = tuple[str | int, ...]
IsText = Callable[[Keys], bool]


@dataclass(frozen=True)
class Document:
    """`values`: the mapping; `lines`: the 1-based line of each key path; `duplicates`: key paths given twice."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Keys, int] = field(default_factory=dict)
    duplicates: list[tuple[Keys, int]] = field(default_factory=list)


def read(path: Path, is_text: IsText, own: bool = False) -> Document:
    """Read the mapping in `path`; `is_text` decides which key paths take text, so that ``name: 007`` stays as it is.

    own: the file is in a run, and must not be a link. Anchors, aliases and tags are refused: a config of this
    tool never needs them, and nested aliases expand to billions of values. Raises `ConfigError` for a missing,
    oversized or malformed file, and for a pipe, which may never end.
    """
    import yaml

    try:
        if path.is_dir():
            raise ConfigError(
                f"{path} is a folder, not a config file",
                f"write a config for it with: finetune init {path}",
            )
        with files.open_own(path) if own else files.open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as exc:
        raise ConfigError(f"there is no file {path}", "write one with: finetune init PHOTOS") from exc
    except OSError as exc:
        raise ConfigError(
            f"cannot read {path}: {exc.strerror}", "save it as a YAML file that you can read, and name that"
        ) from exc
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES // 1024} KiB, which no config is", _WRITE_ONE)
    try:
        node = yaml.compose(_checked(data, path), Loader=yaml.SafeLoader)
        if node is None:
            return Document()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path} holds no mapping of sections such as `data:`", _WRITE_ONE)
        document = Document()
        document.values.update(_construct(node, (), is_text, document))
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(exc)}", "correct that line") from exc
    return document


def parse_argument(text: str, keys: Keys, is_text: IsText) -> Any:
    """The value of `text`, given on the command line for `keys`. Raises `ValueError` when it is malformed.

    Text is taken literally, whatever it looks like: only empty text and the word null mean null. Elsewhere a
    value in brackets, braces or quotes is YAML, and any other is a number, true, false, null or a word.
    """
    import yaml

    if is_text(keys):
        return None if text in _NULL - {"~"} else text
    text = text.strip()
    if not text.startswith(("{", "[", '"', "'")):
        return plain_scalar(text)
    try:
        checked = _checked(text.encode("utf-8", "surrogateescape"), Path("command line"))
        node = yaml.compose(checked, Loader=yaml.SafeLoader)
        if node is None or node.end_mark.index < len(checked):
            raise ValueError(f"{checked[node.end_mark.index if node else 0 :].strip()!r} follows its end")
        document = Document()
        value = _construct(node, keys, is_text, document)
    except (yaml.YAMLError, ConfigError, RecursionError) as exc:
        raise ValueError(_one_line(exc)) from exc
    if document.duplicates:
        raise ValueError(f"`{document.duplicates[0][0][-1]}` is given twice")
    return value


def plain_scalar(text: str) -> Any:
    """The value of a scalar without quotes: null, true, false, a decimal number, or else the text itself."""
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1].isalpha() else text)
    return text


def _construct(node: Any, keys: Keys, is_text: IsText, document: Document) -> Any:
    """The value of `node`, whose key path is `keys`; lines and duplicates are added to `document`."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"line {key_node.start_mark.line + 1}: a key must be a word")
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in values:
                document.duplicates.append(((*keys, key), line))
            document.lines[(*keys, key)] = line
            values[key] = _construct(value_node, (*keys, key), is_text, document)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*keys, i), is_text, document) for i, child in enumerate(node.value)]
    plain = node.style is None
    if plain and (node.value in _NULL or not is_text(keys)):
        return plain_scalar(node.value)
    return node.value


def _checked(data: bytes, path: Path) -> str:
    import yaml

    opening = yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken
    opening |= yaml.BlockSequenceStartToken | yaml.BlockMappingStartToken
    closing = yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken | yaml.BlockEndToken
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text: {exc.reason} at byte {exc.start}", "save it as UTF-8") from exc
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        position = f"{path}, line {token.start_mark.line + 1}"
        if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
            raise ConfigError(f"{position}: anchors and aliases are not allowed here", "write the value out")
        if isinstance(token, yaml.TagToken):
            raise ConfigError(f"{position}: tags such as !!str are not allowed here", "write the value without it")
        if isinstance(token, yaml.ScalarToken) and len(token.value) > MAX_SCALAR:
            raise ConfigError(
                f"{position}: a value of more than {MAX_SCALAR} characters, which no key takes", "shorten it"
            )
        depth += isinstance(token, opening)
        depth -= isinstance(token, closing)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{position}: nested more than {MAX_DEPTH} deep, which no config is", _WRITE_ONE)
    return text


def _one_line(exc: Exception) -> str:
    mark = getattr(exc, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(exc, 'problem', None) or 'malformed'}"
    return " ".join(str(exc).split())
