"""Text that is safe to show: file names and messages from files may hold anything."""


def shown(text: object) -> str:
    """`text` on one line with every control, bidirectional or undecodable character as a visible escape."""
    return "".join(map(_visible, str(text)))


def _visible(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
