"""An object store as Ray Train sees it: through the same client as ours, and with the same patience.

Ray itself would take pyarrow's client, which finds credentials and endpoints by other rules than ours, and would end a run where one request fails.
"""

from collections.abc import Callable
from io import BytesIO
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow.fs import FileSelector, FSSpecHandler, PyFileSystem

from sentinode.locations import Location
from sentinode.object_store import file_system, path_in
from sentinode.retries import try_store

_T = TypeVar("_T")


def storage_of(folder: Location) -> tuple[PyFileSystem | None, str]:
    """Return a file system for Ray Train, None for its own, and what a folder is called in it."""
    if folder.is_local:
        return None, str(folder)
    scheme = folder.uri.partition("://")[0]
    return PyFileSystem(_StoreHandler(scheme)), path_in(file_system(scheme), folder.uri)


class _StoreHandler(FSSpecHandler):  # type: ignore[misc]
    """What Ray Train calls, each call tried again like ours. Small files only are written: checkpoints go their own way."""

    def __init__(self, scheme: str) -> None:
        super().__init__(file_system(scheme))
        self._scheme = scheme

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew in each process: clients do not travel.
        return _StoreHandler, (self._scheme,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StoreHandler) and other._scheme == self._scheme

    def get_file_info(self, paths: list[str]) -> Any:
        return self._try(paths[0], lambda: super(_StoreHandler, self).get_file_info(paths))

    def get_file_info_selector(self, selector: FileSelector) -> Any:
        return self._try(selector.base_dir, lambda: super(_StoreHandler, self).get_file_info_selector(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a store has no folders, and asking s3fs for one could make a bucket."""

    def delete_dir(self, path: str) -> None:
        self._try(path, lambda: self.fs.rm(path, recursive=True))

    def delete_file(self, path: str) -> None:
        self._try(path, lambda: self.fs.rm_file(path))

    def open_input_stream(self, path: str) -> Any:
        return pa.BufferReader(self._try(path, lambda: self.fs.cat_file(path)))

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_Upload(lambda data: self._try(path, lambda: self.fs.pipe_file(path, data))), mode="w")

    def _try(self, path: str, action: Callable[[], _T]) -> _T:
        return try_store(f"{self._scheme}://{path}", action)


class _Upload(BytesIO):
    """A file in memory that is put into the store when it is closed."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        super().__init__()
        self._put = put

    def close(self) -> None:
        if not self.closed:
            self._put(self.getvalue())
        super().close()
