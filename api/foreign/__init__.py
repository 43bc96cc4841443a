"""What we need other libraries to do differently: subclasses of theirs, one file a library, each fit to be sent upstream.

Nothing here changes a library for anybody else: whoever wants the difference makes the subclass. Each file names the upstream
behaviour that it changes and the versions that it was tried with; `require` refuses to start with any other.
"""

from __future__ import annotations

from importlib.metadata import version

from runtime.errors import UntestedLibrary


def require(library: str, first: str, below: str) -> None:
    """Raises UntestedLibrary unless the installed version is `first` or later, and earlier than `below`."""
    installed = version(library)
    if not _parts(first) <= _parts(installed) < _parts(below):
        raise UntestedLibrary(
            f"{library} {installed} is installed, and what we change of it was tried with {first} and later below "
            f"{below}: pip install '{library}>={first},<{below}'"
        )


def _parts(written: str) -> tuple[int, ...]:
    """The leading numbers of a version; what a pre-release adds is left out."""
    parts: list[int] = []
    for part in written.split("."):
        if not part.isdecimal():
            break
        parts.append(int(part))
    return tuple(parts)
