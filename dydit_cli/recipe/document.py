"""Read a recipe file into plain values with the line of every key, collecting mistakes of form on the way.

The YAML is composed but never constructed: its nodes carry line numbers, and plain scalars are kept as the text that was
written (see `values`). So no YAML tag can build an object, and one pass reports everything that is wrong with the form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dydit_cli.errors import DyditError
from dydit_cli.recipe.mistakes import Mistake, Place, refuse, unknown
from dydit_cli.recipe.schema import SCHEMA_VERSION, SECTIONS

HEADER_KEYS = ("schema", "name", "description")

_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}"
    for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "merge", "value")
)
_NULL = "tag:yaml.org,2002:null"
_LARGEST_BYTES = 1_000_000


@dataclass
class Document:
    """A recipe file as it was written.

    Attributes:
        source: The file's name as the user gave it, for messages.
        header: `name` and `description`, where given.
        sections: Values by section and key; scalars are text or None.
        places: Where each key, `section.key` or `section`, stands.
        mistakes: What is wrong with the form.
    """

    source: str
    header: dict[str, str] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    def complain(self, node: yaml.Node, key: str, message: str) -> None:
        """Note a mistake at the line of `node`."""
        self.mistakes.append(Mistake(Place(self.source, _line(node)), key, message))


def read_document(path: Path, source: str) -> Document:
    """Read the recipe at `path`.

    Args:
        path: The file.
        source: How messages call it.

    Raises:
        DyditError: The file cannot be read, or is no YAML, so that nothing more can be said about its keys.
    """
    document = Document(source)
    root = _compose(_read_text(path, source), source)
    if not isinstance(root, yaml.MappingNode):
        raise _not_a_recipe(
            source, "It holds no `key: value` lines" if root is None else "Its top level is no mapping"
        )
    _refuse_newer(root, source)
    for key, node, value in _entries(document, root, ""):
        if key in SECTIONS:
            _read_section(document, key, node, value)
        elif key in HEADER_KEYS:
            _read_header(document, key, value)
        else:
            document.complain(node, key, unknown(key, [*HEADER_KEYS, *SECTIONS]))
    if "schema" not in document.places:
        message = f"required key is missing; write `schema: {SCHEMA_VERSION}` as the first line"
        document.mistakes.append(Mistake(Place(source, _line(root)), "schema", message))
    return document


def scalar(text: str) -> Any:
    """Read a value as it stands after `key=`: text, `null` or `~` for nothing, or a YAML list in brackets.

    Raises:
        ValueError: The list is not written as YAML.
    """
    if text.strip() in {"null", "~"}:
        return None
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        raise ValueError(f"is no list that can be read, got {text!r}") from None
    return None if node is None else _value(node)


def _read_text(path: Path, source: str) -> str:
    """Read the file as UTF-8, refusing what is certainly no recipe (a checkpoint given by mistake)."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_BYTES + 1)
    except IsADirectoryError:
        raise _not_a_recipe(source, "It is a folder") from None
    except OSError as error:
        raise DyditError(
            f"Cannot read the recipe {source}.",
            why=f"The system says: {error.strerror or error}.",
            fix="Check the file's permissions, or give another recipe.",
        ) from error
    if len(data) > _LARGEST_BYTES:
        raise _not_a_recipe(source, "It is larger than a megabyte")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_a_recipe(source, f"Line {line} holds bytes that are not UTF-8 text") from None


def _compose(text: str, source: str) -> yaml.Node | None:
    """Parse YAML into nodes; a fault of syntax stops here because nothing after it can be trusted."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        message = f"not valid YAML: {error.problem or error.context}"
        raise refuse([Mistake(Place(source, line), "", message)]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = "not valid YAML: a control character that text files do not hold"
        raise refuse([Mistake(Place(source, line), "", message)]) from None
    except RecursionError:
        raise _not_a_recipe(source, "Its values are nested too deeply") from None


def _not_a_recipe(source: str, why: str) -> DyditError:
    return DyditError(
        f"{source} is not a recipe.",
        why=f"{why}.",
        fix="Give a YAML file such as `dydit recipes copy NAME` writes; `dydit recipes list` names them.",
    )


def _refuse_newer(root: yaml.MappingNode, source: str) -> None:
    """Stop at a recipe of a later version, whose keys this version cannot judge."""
    for key, value in root.value:
        if key.value == "schema" and isinstance(value, yaml.ScalarNode) and value.value.isdecimal():
            version = int(value.value)
            if version > SCHEMA_VERSION:
                raise DyditError(
                    f"{source}:{_line(value)}: schema: version {version} is newer than this dydit reads.",
                    why=f"This dydit knows recipes up to version {SCHEMA_VERSION}.",
                    fix="Update dydit, or start from a recipe of this version (`dydit recipes copy NAME`).",
                )


def _entries(
    document: Document, mapping: yaml.MappingNode, prefix: str
) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Walk a mapping's keys in order, noting where each stands and refusing a key that is written twice."""
    for key_node, value_node in mapping.value:
        if not isinstance(key_node, yaml.ScalarNode):
            document.complain(key_node, prefix.rstrip("."), "a key must be a single word")
            continue
        key = key_node.value
        if first := document.places.get(prefix + key):
            document.complain(key_node, prefix + key, f"written twice; the first is in line {first.line}")
            continue
        document.places[prefix + key] = Place(document.source, _line(key_node))
        yield key, key_node, value_node


def _read_header(document: Document, key: str, value: yaml.Node) -> None:
    written = value.value if isinstance(value, yaml.ScalarNode) else None
    if written is None:
        document.complain(value, key, "must be a single value")
    elif key != "schema":
        document.header[key] = written
    elif written != str(SCHEMA_VERSION):
        document.complain(value, key, f"must be {SCHEMA_VERSION}, got {written!r}")


def _read_section(document: Document, name: str, key_node: yaml.Node, value: yaml.Node) -> None:
    if isinstance(value, yaml.ScalarNode) and value.tag == _NULL:
        document.sections[name] = {}  # `sample:` with nothing below means all defaults.
        return
    if not isinstance(value, yaml.MappingNode):
        document.complain(key_node, name, "must hold indented `key: value` lines")
        return
    document.sections[name] = {}
    fields = SECTIONS[name].model_fields
    for key, node, child in _entries(document, value, f"{name}."):
        if key not in fields:
            document.complain(node, f"{name}.{key}", unknown(key, fields))
            continue
        try:
            document.sections[name][key] = _value(child)
        except ValueError as error:
            document.complain(child, f"{name}.{key}", str(error))


def _value(node: yaml.Node) -> Any:
    """Return a scalar's text (None for null) or a flat list of them.

    Raises:
        ValueError: The value is something that no key takes.
    """
    if node.tag not in _TAGS:
        raise ValueError(
            f"YAML tags are not used in recipes, got {node.tag.replace('tag:yaml.org,2002:', '!!')}"
        )
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == _NULL else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [_value(item) for item in node.value]
    raise ValueError("must be a single value or a list of single values")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
