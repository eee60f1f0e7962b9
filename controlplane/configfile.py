"""YAML files validated by pydantic models; every complaint names file and line."""

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[int | str, ...]


class ConfigModel(BaseModel):
    """Base of everything read from a file: unknown keys are errors, values are not coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, str_strip_whitespace=True)


class ConfigError(Exception):
    """A file is not what it should be. The message has a line `file:line: what` per complaint."""


class _Loader(yaml.SafeLoader):
    """Refuses aliases: they let a small file mean an endless one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)


def load_yaml(path: Path, model: type[Model]) -> Model:
    """Read `path` as YAML into `model`, or raise ConfigError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    return parse_yaml(text, model, str(path))


def parse_yaml(text: str, model: type[Model], source: str) -> Model:
    """Like `load_yaml`, from text; `source` is the name used in complaints."""
    lines: dict[Location, int] = {}
    try:
        data = _read(text, source, lines)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{source}:{line}: {error.problem or 'not YAML'}") from error
    except (yaml.YAMLError, ValueError) as error:  # a character or number that YAML cannot hold
        raise ConfigError(f"{source}:1: not YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{source}:1: nested too deeply") from None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaints(error, lines, source))) from error


def _read(text: str, source: str, lines: dict[Location, int]) -> object:
    """Return the one document in `text`, and enter into `lines` where each value stands."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{source}:1: the file is empty")
        duplicates: list[str] = []
        _index(root, (), lines, duplicates, source)
        if duplicates:
            raise ConfigError("\n".join(duplicates))
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _index(
    node: yaml.Node,
    at: Location,
    lines: dict[Location, int],
    duplicates: list[str],
    source: str,
) -> None:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a plain word", problem_mark=key.start_mark
                )
            here = (*at, key.value)
            if here in lines:
                duplicates.append(f"{source}:{key.start_mark.line + 1}: {key.value} is given twice")
            lines[here] = key.start_mark.line + 1
            _index(value, here, lines, duplicates, source)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _index(item, (*at, number), lines, duplicates, source)


def _complaints(error: ValidationError, lines: dict[Location, int], source: str) -> list[str]:
    complaints = []
    for item in error.errors(include_url=False):
        location: Location = tuple(item["loc"])
        name = ".".join(str(part) for part in location) or "the file"
        known = location
        while known and known not in lines:
            known = known[:-1]
        match item["type"]:
            case "extra_forbidden":
                what = f"unknown key {name}"
            case "missing":
                what = f"{name} is missing"
            case _:
                what = f"{name}: {item['msg'].removeprefix('Value error, ')}"
                if isinstance(item["input"], str | int | float | bool):
                    what += f" (is {item['input']!r})"
        complaints.append(f"{source}:{lines.get(known, 1)}: {what}")
    return complaints
