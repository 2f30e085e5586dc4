"""ConfigDict for machines that only measure and lack ml_collections: what experiments/*.py use."""

import sys
import types
from collections.abc import Iterator, Mapping


class _Placeholder:
    def __init__(self, kind: type):
        self.kind = kind


def placeholder(kind: type) -> _Placeholder:
    """A value that is None until it is set, of this type."""
    return _Placeholder(kind)


class ConfigDict:
    """Nested sections whose keys are attributes; a placeholder reads as None."""

    def __init__(self, initial: Mapping = types.MappingProxyType({})):
        object.__setattr__(self, "_values", {})
        for name, value in initial.items():
            self[name] = value

    def __getitem__(self, name: str):
        value = self._values[name]
        return None if isinstance(value, _Placeholder) else value

    def __setitem__(self, name: str, value) -> None:
        self._values[name] = ConfigDict(value) if isinstance(value, dict) else value

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the section has no key {name!r}") from None

    def __setattr__(self, name: str, value) -> None:
        self[name] = value

    def items(self) -> Iterator[tuple[str, object]]:
        return ((name, self[name]) for name in self._values)

    def get_type(self, name: str) -> type:
        value = self._values[name]
        return value.kind if isinstance(value, _Placeholder) else type(value)


def provide() -> None:
    """Lets `import ml_collections` find these two where the package itself is missing."""
    try:
        import ml_collections  # noqa: F401
    except ModuleNotFoundError:
        package = types.ModuleType("ml_collections")
        module = types.ModuleType("ml_collections.config_dict")
        for place in (package, module):
            place.ConfigDict, place.placeholder = ConfigDict, placeholder
        package.config_dict = module
        sys.modules |= {"ml_collections": package, "ml_collections.config_dict": module}


def in_use() -> bool:
    """Whether `provide` had to."""
    return sys.modules["ml_collections"].ConfigDict is ConfigDict
