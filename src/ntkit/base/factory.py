"""The user's own code by name: ``package.module:factory`` or ``file.py:factory``.

A name is first read: which files would run, and what is in them, without importing anything, not even a parent package
(`read_code`). Then exactly these bytes run (`UserCode.run`). Between the two, `ntkit.base.trust` decides.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

from ntkit.base.checks import nearest, refusal
from ntkit.base.regular_files import open_regular

_LARGEST = 2**24  # bytes of a Python file


@dataclass(frozen=True)
class UserCode:
    """A factory's name, and the files that run when it is imported, as they were read; none of them has run.

    Attributes
    ----------
    option, name : the option and the name as written.
    files : resolved path to the content's full SHA-256; a module without a file (part of Python) has its name and "".
    """

    option: str
    name: str
    files: dict[str, str]
    specs: tuple[ModuleSpec, ...]
    contents: dict[str, bytes]  # of source files, by module

    @property
    def attribute(self) -> str:
        """Name of the factory in its module."""
        return self.name.rpartition(":")[2]

    def run(self) -> Callable[..., Any]:
        """Import the module from the bytes read, and return the factory."""
        place, _, attribute = self.name.rpartition(":")
        module = self._run_file(place) if place.endswith(".py") else self._import(place)
        if not callable(factory := getattr(module, attribute, None)):
            names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            got = f"no factory '{attribute}' in {place}"
            fix = nearest(attribute, names)
            raise refusal(f"{self.option} {self.name}", got=got, expected="a callable", fix=fix)
        return factory

    def _run_file(self, place: str) -> Any:
        spec = self.specs[0]
        module = importlib.util.module_from_spec(spec)
        loader = _BytesRead(spec.name, str(spec.origin), self.contents[spec.name])
        try:
            code = loader.get_code(spec.name)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            got = f"no Python: {error}" if str(error) else f"no Python ({type(error).__name__})"
            subject = f"{self.option} {self.name}"
            raise refusal(subject, got=got, expected="a Python file", fix=f"Correct {place}.") from error
        sys.modules[spec.name] = module  # dataclasses, among others, look up their module by name
        sys.path.insert(0, os.path.dirname(str(spec.origin)))  # as for a script: it may import the files beside it
        try:
            exec(code, module.__dict__)
        finally:
            sys.path.pop(0)
        return module

    def _import(self, place: str) -> Any:
        finder = _FinderOfBytes(self)
        sys.meta_path.insert(0, finder)
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise _no_module(self.option, self.name, f"no module {error.name}") from error
        finally:
            sys.meta_path.remove(finder)


class _BytesRead(SourceFileLoader):
    """Loads a module from bytes in memory: neither the file, which may have changed, nor its compiled copy is read."""

    def __init__(self, name: str, path: str, content: bytes) -> None:
        super().__init__(name, path)
        self._content = content

    def get_code(self, fullname: str) -> Any:
        """Compile the bytes."""
        return self.source_to_code(self._content, self.path)


class _FinderOfBytes(MetaPathFinder):
    """Finds the modules of some user code as they were read."""

    def __init__(self, code: UserCode) -> None:
        self._code = code

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Spec of one of the modules; None for others."""
        for spec in self._code.specs:
            if spec.name == fullname and fullname in self._code.contents:
                loader = _BytesRead(fullname, str(spec.origin), self._code.contents[fullname])
                places = spec.submodule_search_locations
                return importlib.util.spec_from_file_location(
                    fullname, spec.origin, loader=loader, submodule_search_locations=places and list(places)
                )
        return None


Read = dict[tuple[str, str], UserCode | None]

# What a command has read and may run, by option and name; None: a name that was no code when it was read.
READ: ContextVar[Read | None] = ContextVar("READ", default=None)


def is_code(option: str, name: str) -> bool:
    """Whether a name is that of user code, not of a built-in network, a data set or a path."""
    return ":" in name and not (option == "--data" and os.path.exists(os.path.expanduser(name)))


def find(option: str, name: str, built_in: Iterable[str]) -> Callable[..., Any]:
    """Return the object that ``package.module:attribute`` or ``file.py:attribute`` names.

    Parameters
    ----------
    option : the option's name in error messages, e.g. --model.
    name : as the user wrote it.
    built_in : names that need no module, to list in the error message.

    Raises
    ------
    Refused
        When the file, the module or the attribute does not exist.
    """
    if ":" not in name:
        expected = "a built-in name, package.module:factory or file.py:factory"
        raise refusal(option, got=repr(name), expected=expected, fix=nearest(name, built_in))
    read = READ.get() or {}
    code = read[option, name] if (option, name) in read else read_code(option, name)
    if code is None:
        got, expected = "a path that was there a moment ago and is gone", "files that stay"
        raise refusal(f"{option} {name}", got=got, expected=expected, fix="Begin again.")
    return code.run()


def check_call(factory: Callable[..., Any], subject: str, arguments: Mapping[str, Any], expected: str) -> None:
    """Refuse a factory that has other required arguments than these."""
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        got, fix = f"a factory that could not be called ({error})", "Give its other parameters default values."
        raise refusal(subject, got=got, expected=expected, fix=fix) from error


def source_hash(option: str, name: str) -> str | None:
    """SHA-256 (first 16 characters) of the file that defines a factory; None for names that are no code."""
    if not is_code(option, name):
        return None
    code = (READ.get() or {}).get((option, name)) or read_code(option, name)
    return list(code.files.values())[-1][:16] or None


def read_code(option: str, name: str) -> UserCode:
    """Read the files that a name would run, and import nothing.

    Raises
    ------
    Refused
        When there is no such file or module.
    """
    place = name.rpartition(":")[0]
    if not place.endswith(".py"):
        return _read_modules(option, name, place)
    with open_regular(place, "a Python file", "Check the path.") as handle:
        content = handle.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        got = f"more than {_LARGEST:,} bytes"
        raise refusal(place, got=got, expected="a Python file", fix="Check the path.")
    path = os.path.realpath(place)  # also what the file knows as its own: behind a link lie other files beside it
    spec = importlib.util.spec_from_file_location(f"ntkit_user_{Path(place).stem}", path)
    assert spec is not None
    return UserCode(option, name, {path: hashlib.sha256(content).hexdigest()}, (spec,), {spec.name: content})


def _read_modules(option: str, name: str, place: str) -> UserCode:
    """Read a module and its parent packages, outermost first: importing it runs them all."""
    parts = place.split(".")
    files: dict[str, str] = {}
    specs, contents = [], {}
    places: list[str] = []
    for depth in range(1, len(parts) + 1):
        module = ".".join(parts[:depth])
        spec = _spec(module, places) if all(parts) and "\0" not in place else None
        if spec is None:
            raise _no_module(option, name, f"no module {module if all(parts) else repr(place)}")
        specs.append(spec)
        places = list(spec.submodule_search_locations or ())
        read = getattr(spec.loader, "get_data", None)
        if read is None or not spec.has_location:
            if spec.origin is not None or spec.submodule_search_locations is None:  # no namespace package
                files[f"{module} ({spec.origin or 'no file'})"] = ""  # part of Python
            continue
        try:
            content = read(spec.origin)
        except OSError as error:
            raise _no_module(option, name, f"{spec.origin}: {error.strerror or error}") from error
        files[str(Path(str(spec.origin)).resolve())] = hashlib.sha256(content).hexdigest()
        if isinstance(spec.loader, SourceFileLoader):
            contents[module] = content
    if not files:
        raise _no_module(option, name, f"{place}, a folder without code")
    return UserCode(option, name, files, tuple(specs), contents)


def _spec(module: str, places: list[str]) -> ModuleSpec | None:
    """Where a module comes from: the top of its packages by the usual finders, the rest in the folders of its parent.

    ``importlib.util.find_spec("a.b")`` is no help: it imports ``a``.
    """
    loaded = sys.modules.get(module)
    if loaded is not None and (spec := getattr(loaded, "__spec__", None)) is not None:
        return spec
    if loaded is not None:  # __main__ of a script or a notebook has no spec
        file = getattr(loaded, "__file__", None)
        return ModuleSpec(module, None) if file is None else importlib.util.spec_from_file_location(module, file)
    if "." not in module:
        try:
            return importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
    namespace = ModuleSpec(module, None, is_package=True)
    portions: list[str] = []
    for place in places:
        finder: Any = pkgutil.get_importer(place)
        spec = finder.find_spec(module) if finder is not None else None
        if spec is not None and spec.loader is not None:
            return spec
        portions += spec.submodule_search_locations or () if spec is not None else ()
    namespace.submodule_search_locations = portions
    return namespace if portions else None


def _no_module(option: str, name: str, got: str) -> Any:
    fix = "Install it, or name the file: path/file.py:factory."
    return refusal(f"{option} {name}", got=got, expected="an importable module", fix=fix)
