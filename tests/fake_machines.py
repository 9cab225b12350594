"""Machines that Ray's autoscaler starts and ends, for tests: processes on this one, each with temporary files of its own."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ray._private.parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


def _with_a_folder(parameters: Any, folder: Path, **given: Any) -> Any:
    (folder / "tmp").mkdir()
    return parameters(temp_dir=str(folder), **given | {"env_vars": given["env_vars"] | {"TMPDIR": str(folder / "tmp")}})


class FakeMachines(FakeMultiNodeProvider):  # type: ignore[misc]
    """Ray's own provider for tests, whose nodes share a folder: one that ends would remove the code of jobs on the others.

    Named as `module` of a provider of type `external`; `folder` there is where the nodes' folders are made, a short path.
    """

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock:  # nodes are launched by several threads
            there = Path(self.provider_config["folder"])
            folder = there / f"m{len(list(there.glob('m*')))}"
            folder.mkdir()
            with mock.patch("ray._private.parameter.RayParams", partial(_with_a_folder, ray._private.parameter.RayParams, folder)):
                super()._create_node_with_resources_and_labels(*arguments)
