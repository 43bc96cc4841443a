"""All operations on an object store, so that a test can put a class here that makes one of them fail or wait.

obstore is installed by an extra, so it is imported where it is called.
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
# The longest that one call waits for the store, retries included, in seconds.
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
    """Every method raises OSError. After a write that timed out the object may exist, or may still appear later."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def create(self, key: str, content: bytes) -> None:
        """Writes a new object. Raises FileExistsError if it exists."""
        import obstore

        with _os_errors():
            obstore.put(self._store, key, content, mode="create", use_multipart=False)

    def put(self, key: str, content: bytes | memoryview) -> None:
        """Writes a whole object, replacing the one that exists."""
        import obstore

        with _os_errors():
            obstore.put(self._store, key, content, use_multipart=False)

    def read(self, key: str) -> bytes:
        """The object's content. Raises FileNotFoundError if there is none."""
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
        """Every object whose key begins with `prefix`, the name of a folder."""
        import obstore

        with _os_errors():
            return [
                Listed(found["path"], found["size"], found["last_modified"].timestamp())
                for found in obstore.list(self._store, prefix).collect()
            ]

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects in no particular order; missing ones are ignored."""
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
    """Opens the object store at a URL and checks that it honours conditional writes. Raises InvalidSetting.

    Credentials come from the environment, as in each vendor's own tools.
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
                # An endpoint without TLS has to be named explicitly, such as a server on this machine, so it is intended.
                client_options={"timeout": _LONGEST_TRY, "allow_http": True},
                retry_config={"max_retries": _TRIES, "retry_timeout": _LONGEST_CALL},
            )
    except Exception as error:
        raise InvalidSetting(f"state_dir={url} cannot be opened: {_first_line(error)}") from error
    objects = Objects(store)
    check_conditional_writes(objects, url)
    return objects


def check_conditional_writes(objects: Objects, url: str) -> None:
    """Raises InvalidSetting if the store lets the same object be created twice."""
    # A store that ignores If-None-Match would let two servers write one session.
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
    """Turns obstore's errors in the block into the OSErrors that files raise."""
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
