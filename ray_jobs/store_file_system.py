"""An object store as Ray Train sees it: through the same client as ours, and with the same patience.

Ray itself would take pyarrow's client, which finds credentials and endpoints by other rules than ours, and would end a run where one request fails.
"""

from collections.abc import Callable
from io import BytesIO
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow.fs import FileSelector, FSSpecHandler, PyFileSystem

from ray_jobs.run_folder import problem_with
from sentinode.locations import Location
from sentinode.object_store import file_system, path_in
from sentinode.retries import try_store

_T = TypeVar("_T")


def storage_of(folder: Location, run: Location, run_id: str) -> tuple[PyFileSystem | None, str]:
    """Return a file system for Ray Train, None for its own, and what a folder of the run in `run` is called in it.

    Nothing is changed through it once the run's request has another id than `run_id`: Ray would remove what the process needs that has the run now.
    """
    if folder.is_local:
        return None, str(folder)
    scheme = folder.uri.partition("://")[0]
    return PyFileSystem(_StoreHandler(run, run_id)), path_in(file_system(scheme), folder.uri)


class _StoreHandler(FSSpecHandler):  # type: ignore[misc]
    """What Ray Train calls, each call tried again like ours. Small files only are written: checkpoints go their own way."""

    def __init__(self, run: Location, run_id: str) -> None:
        self._scheme, self._run, self._run_id = run.uri.partition("://")[0], run, run_id
        super().__init__(file_system(self._scheme))

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew in each process: clients do not travel.
        return _StoreHandler, (self._run, self._run_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StoreHandler) and (other._run, other._run_id) == (self._run, self._run_id)

    def get_file_info(self, paths: list[str]) -> Any:
        return self._try(paths[0], lambda: super(_StoreHandler, self).get_file_info(paths))

    def get_file_info_selector(self, selector: FileSelector) -> Any:
        return self._try(selector.base_dir, lambda: super(_StoreHandler, self).get_file_info_selector(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a store has no folders, and asking s3fs for one could make a bucket."""

    def delete_dir(self, path: str) -> None:
        if self._is_ours():
            self._try(path, lambda: self.fs.rm(path, recursive=True))

    def delete_file(self, path: str) -> None:
        if self._is_ours():
            self._try(path, lambda: self.fs.rm_file(path))

    def open_input_stream(self, path: str) -> Any:
        return pa.BufferReader(self._try(path, lambda: self.fs.cat_file(path)))

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        def put(data: bytes) -> None:
            if self._is_ours():
                self._try(path, lambda: self.fs.pipe_file(path, data))

        return pa.PythonFile(_Upload(put), mode="w")

    def _is_ours(self) -> bool:
        return problem_with(self._run, self._run_id) is None

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
