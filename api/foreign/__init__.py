"""What we need other libraries to do differently: a file of subclasses for each library, each fit to be sent upstream.

Importing these modules changes no library; who needs the difference uses the subclass. Each file names the upstream
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
    """The leading numbers of a version, without the suffix of a pre-release."""
    parts: list[int] = []
    for part in written.split("."):
        if not part.isdecimal():
            break
        parts.append(int(part))
    return tuple(parts)
