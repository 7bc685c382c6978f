"""The YAML that configs are written in: the numbers of YAML 1.2, no anchors, no key twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

from isoform.errors import ConfigError

MAX_CONFIG_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2 (`1e-4` is a number) and duplicate keys refused."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(
                f"line {line}: a {key_node.id} stands where a key is expected; put a text that begins with a brace "
                "or a bracket in quotes"
            )
        if key_node.value in seen:
            raise ConfigError(f"line {line}: the key {key_node.value!r} is given twice; keep one")
        seen.add(key_node.value)
    loader.flatten_mapping(node)
    pairs = [
        (loader.construct_object(key, deep=True), loader.construct_object(item, deep=True)) for key, item in node.value
    ]
    return dict(pairs)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises: ConfigError with the place of the mistake."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where}: {len(text)} characters given, at most {MAX_CONFIG_BYTES} are expected")
    if re.search(r"(?m)(^|[\s\[{,:-])[*&][A-Za-z0-9_]+\s*($|[\s,\]}])", text):
        raise ConfigError(f"{where}: YAML anchors and aliases are not read; write the value out, or use `extends`")
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{where}{place}: not YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{where}: lists and mappings stand too deep in one another") from None
    except (ValueError, AttributeError, LookupError) as error:
        # What looks like a number or a date and is none, such as 2024-13-45: the library lets its own errors through.
        raise ConfigError(f"{where}: a value cannot be read ({error}); put it in quotes if it is a text") from None
