"""YAML text in, plain values and the line of every key out; nothing in a file can run code or eat the memory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_cli.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_SCALAR = 4096
MAX_DEPTH = 10
_WRITE_ONE = "write a config with: finetune init PHOTOS"
Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """`values`: the mapping; `lines`: the 1-based line of each key path; `duplicates`: key paths given twice."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Keys, int] = field(default_factory=dict)
    duplicates: tuple[tuple[Keys, int], ...] = ()


def read(path: Path) -> Document:
    """Read the mapping in `path`.

    Anchors and aliases are refused: a config of this tool never needs them, and nested ones expand to billions of
    values. Raises `ConfigError` for a missing, oversized or malformed file.
    """
    import yaml

    try:
        if path.is_dir():
            raise ConfigError(
                f"{path} is a folder, not a config file",
                f"write a config for it with: finetune init {path}",
            )
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as exc:
        raise ConfigError(f"there is no file {path}", "write one with: finetune init PHOTOS") from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}", "name a YAML file that you can read") from exc
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES // 1024} KiB, which no config is", _WRITE_ONE)
    try:
        node = yaml.compose(_without_aliases(data, path), Loader=yaml.SafeLoader)
        if node is None:
            return Document()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path} holds no mapping of sections such as `data:`", _WRITE_ONE)
        lines: dict[Keys, int] = {}
        duplicates: list[tuple[Keys, int]] = []
        _collect(node, (), lines, duplicates)
        values = yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(exc)}", "correct that place") from exc
    return Document(values, lines, tuple(duplicates))


def parse_scalar(text: str) -> Any:
    """The value of `text` as YAML would read it on the right of a key. Raises `ValueError` when malformed."""
    import yaml

    try:
        return yaml.safe_load(_without_aliases(text.encode("utf-8", "surrogateescape"), Path("command line")))
    except (yaml.YAMLError, ConfigError, RecursionError) as exc:
        raise ValueError(_one_line(exc)) from exc


def _without_aliases(data: bytes, path: Path) -> str:
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
        place = f"{path}, line {token.start_mark.line + 1}"
        if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
            raise ConfigError(f"{place}: anchors and aliases are not allowed here", "write the value out")
        if isinstance(token, yaml.ScalarToken) and len(token.value) > MAX_SCALAR:
            raise ConfigError(
                f"{place}: a value of more than {MAX_SCALAR} characters, which no key takes", "shorten it"
            )
        depth += isinstance(token, opening)
        depth -= isinstance(token, closing)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{place}: nested more than {MAX_DEPTH} deep, which no config is", _WRITE_ONE)
    return text


def _collect(node: Any, keys: Keys, lines: dict[Keys, int], duplicates: list[tuple[Keys, int]]) -> None:
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in seen:
                duplicates.append(((*keys, key), line))
            seen.add(key)
            lines[(*keys, key)] = line
            _collect(value_node, (*keys, key), lines, duplicates)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _collect(child, (*keys, index), lines, duplicates)


def _one_line(exc: Exception) -> str:
    mark = getattr(exc, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(exc, 'problem', None) or 'malformed'}"
    return " ".join(str(exc).split())
