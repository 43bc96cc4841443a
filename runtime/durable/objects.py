"""The operations on an object store, and no other ones: a test that makes one of them fail or wait stands in this place.

obstore comes with an extra, so it is imported where it is called.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from runtime.errors import InvalidSetting

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az", "memory", "file")
# A call that waits for the store waits so long at most, tries included.
_LONGEST_CALL = timedelta(seconds=20)
_LONGEST_TRY = timedelta(seconds=10)
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing. `modified` is in seconds since 1970, by the store's clock."""

    key: str
    size: int
    modified: float


class Objects:
    """Every method raises OSError. After one that timed out, what was to be written may be there, or come to be there."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def create(self, key: str, content: bytes) -> None:
        """Writes an object that is not there yet. Raises FileExistsError where one is."""
        import obstore

        with _os_errors():
            obstore.put(self._store, key, content, mode="create", use_multipart=False)

    def put(self, key: str, content: bytes | memoryview) -> None:
        """Writes an object whole, over the one that is there."""
        import obstore

        with _os_errors():
            obstore.put(self._store, key, content, use_multipart=False)

    def read(self, key: str) -> bytes:
        """Raises FileNotFoundError where there is none."""
        import obstore

        with _os_errors():
            return bytes(obstore.get(self._store, key).bytes())

    def has(self, key: str) -> bool:
        import obstore

        with _os_errors():
            try:
                obstore.head(self._store, key)
            except FileNotFoundError:
                return False
            return True

    def list(self, prefix: str) -> list[Listed]:
        """Every object whose key begins with `prefix`, a folder's name."""
        import obstore

        with _os_errors():
            return [
                Listed(found["path"], found["size"], found["last_modified"].timestamp())
                for found in obstore.list(self._store, prefix).collect()
            ]

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects in no order; one that is not there is deleted already."""
        import obstore

        if not keys:
            return
        with _os_errors():
            try:
                obstore.delete(self._store, keys)
            except FileNotFoundError:
                for key in keys:
                    with suppress(FileNotFoundError):
                        obstore.delete(self._store, key)


def open_objects(url: str) -> Objects:
    """The object store that a URL names, found to honour conditional writes. Raises InvalidSetting.

    Its credentials come from the environment, as each vendor's own tools have them.
    """
    try:
        from obstore.store import LocalStore, from_url
    except ImportError as error:
        raise InvalidSetting(f"state_dir={url} needs obstore ({error}): pip install 'perennial[cloud]'") from None
    try:
        if url.startswith("file:"):
            store: ObjectStore = LocalStore.from_url(url, mkdir=True, automatic_cleanup=True)
        else:
            store = from_url(
                url,
                # Who names an endpoint without TLS, as of a server beside this one, means it: none is without being named so.
                client_options={"timeout": _LONGEST_TRY, "allow_http": True},
                retry_config={"max_retries": _TRIES, "retry_timeout": _LONGEST_CALL},
            )
    except Exception as error:
        raise InvalidSetting(f"state_dir={url} cannot be opened: {_first_line(error)}") from error
    objects = Objects(store)
    check_conditional_writes(objects, url)
    return objects


def check_conditional_writes(objects: Objects, url: str) -> None:
    """Raises InvalidSetting where a store writes an object twice that is to be created."""
    # A store that takes no notice of If-None-Match would let two servers write one session.
    key = f"probes/{secrets.token_urlsafe(12)}"
    try:
        objects.create(key, b"is this written once?")
        try:
            objects.create(key, b"or twice?")
        except FileExistsError:
            return
        finally:
            objects.delete([key])
    except OSError as error:
        raise InvalidSetting(f"state_dir={url} cannot be written: {error.strerror}") from error
    raise InvalidSetting(f"state_dir={url} does not honour conditional writes (If-None-Match): choose another store")


@contextmanager
def _os_errors() -> Iterator[None]:
    """Raises what obstore raises in the block as the errors that files have."""
    from obstore.exceptions import (
        AlreadyExistsError,
        BaseError,
        NotSupportedError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )

    try:
        yield
    except (AlreadyExistsError, PreconditionError) as error:
        raise FileExistsError(errno.EEXIST, _first_line(error)) from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(errno.EACCES, _first_line(error)) from error
    except NotSupportedError as error:
        raise OSError(errno.ENOTSUP, _first_line(error)) from error
    except BaseError as error:
        raise TimeoutError(errno.ETIMEDOUT, _first_line(error)) from error
    except OSError as error:
        if error.strerror is None:
            raise type(error)(
                errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EIO, _first_line(error)
            ) from error
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
