"""What runs a network: torch, or an engine that `sentinode export` has put into the bundle and compared with torch there (docs/engines.md)."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import ModuleType

import numpy as np
import torch

from sentinode.bundle import Bundle
from sentinode.errors import ManifestError, ManifestNotFoundError, UsageError
from sentinode.manifests import EngineManifest, read_engine_manifest
from sentinode.storage import sha256_file

Run = Callable[[torch.Tensor], torch.Tensor]
"""float32 (n, 3, input_size_px, input_size_px), normalised -> logits, float32 (n, 2). To be called by one thread at a time."""

TORCH = "torch"
INPUT_NAME, OUTPUT_NAME = "patches", "logits"


@dataclass(frozen=True)
class EngineKind:
    """What can be exported.

    Attributes
    ----------
    library : str
        Python module that runs it.
    extra : str
        Extra of this package that brings the library.
    files : tuple of str
        Of the export, beside engine.json.
    limit : float
        Largest deviation of a probability from torch's that is published, and used.
    is_exact : bool
        Whether it computes in float32. What does not is never chosen by `auto`.
    device : str
        What it runs on.
    """

    library: str
    extra: str
    files: tuple[str, ...]
    limit: float = 1e-3
    is_exact: bool = True
    device: str = "cpu"


ENGINES = {
    "onnxruntime": EngineKind("onnxruntime", "onnx", ("model.onnx",)),
    "openvino": EngineKind("openvino", "openvino", ("model.xml", "model.bin")),
    "onnxruntime-int8": EngineKind("onnxruntime", "onnx", ("model.onnx",), limit=1e-2, is_exact=False),
}


def engine_folder(bundle: Bundle, engine: str) -> Path:
    """Return the folder of an engine in a bundle, whether it is there or not."""
    return bundle.path / "engines" / engine


def choose_engine(bundle: Bundle, engine: str, device: str) -> str:
    """Return the name of the engine that runs a bundle: the one rule of evaluate, predict and serve.

    A name is taken at its word. "auto" is the engine in the bundle that was most times as fast as torch when it was exported, of those whose library
    is installed, that run on `device` and compute in float32; torch where none was faster. Of an ensemble, all members run on the same engine.

    Parameters
    ----------
    bundle : Bundle
    engine : str
        "auto", "torch" or a key of ENGINES.
    device : str
        "cpu" or "cuda".

    Raises
    ------
    ManifestError
        The engine, or with "auto" any in the bundle, is damaged or belongs to another bundle: better refused than skipped without a word.
    UsageError
        The engine asked for is not in the bundle, does not run on the device, or its library is not installed.
    """
    if engine == TORCH:
        return TORCH
    networks = bundle.networks()
    if engine != "auto":
        for network in networks:
            if not engine_folder(network, engine).exists():
                raise UsageError(f"{network.where}: no engine {engine} in it; `sentinode export --engine {engine}` adds it")
            read_engine(network, engine)
        if ENGINES[engine].device != device:
            raise UsageError(f"engine {engine} runs on {ENGINES[engine].device}, not on {device}; use engine torch there")
        library_of(engine)
        return engine
    # Rates of different exports may be of different machines and batch sizes; how many times as fast as torch on the same one can be compared.
    times = {TORCH: 1.0}
    for name, kind in ENGINES.items():
        manifests = [read_engine(network, name) for network in networks if engine_folder(network, name).exists()]
        if len(manifests) == len(networks) and kind.is_exact and kind.device == device and _is_installed(name):
            times[name] = fmean(manifest.torch_images_per_second / manifest.images_per_second for manifest in manifests)
    return min(times, key=lambda name: times[name])


def load_engine(network: Bundle, engine: str, model: Run) -> Run:
    """Make the engine of one network ready, with as many threads as torch has in this process.

    Parameters
    ----------
    network : Bundle
        With weights of its own.
    engine : str
        What `choose_engine` returned.
    model : nn.Module
        The network in torch, on its device, in eval mode.

    Raises
    ------
    ManifestError
        The engine is damaged.
    UsageError
        Its library is not installed.
    """
    return model if engine == TORCH else engine_run(engine, _read_files(network, engine))


def engine_run(engine: str, files: dict[str, bytes]) -> Run:
    """Make an engine from the content of its files; raises UsageError where its library is not installed."""
    library, threads = library_of(engine), torch.get_num_threads()
    if ENGINES[engine].library == "openvino":
        return _openvino_run(library, files, threads)
    return _onnxruntime_run(library, files, threads)


def read_engine(bundle: Bundle, engine: str) -> EngineManifest:
    """Return the manifest of an engine that is whole and belongs to the bundle; raises ManifestError."""
    try:
        manifest = read_engine_manifest(engine_folder(bundle, engine))
    except ManifestNotFoundError as error:
        raise ManifestError(f"{error}; remove what is left there, or export it again") from error
    if problems := _problems(bundle, engine, manifest):
        raise ManifestError(f"{bundle.where}: {problems[0]}; export it again, or remove it")
    return manifest


def verify_engines(bundle: Bundle) -> list[str]:
    """Re-check every engine in a bundle; return one line per problem."""
    problems = []
    for name in ENGINES:
        if engine_folder(bundle, name).exists():
            try:
                problems += _problems(bundle, name, read_engine_manifest(engine_folder(bundle, name)))
            except (ManifestError, ManifestNotFoundError) as error:
                problems.append(str(error))
    return problems


def library_of(engine: str) -> ModuleType:
    """Import what runs an engine, without its telemetry; raises UsageError where it is not installed.

    Nothing else imports these libraries: left alone, both write an identifier into the home folder, and send it and what the machine is to their
    makers, as soon as they are imported.
    """
    kind = ENGINES[engine]
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # OpenVINO has a stub for where this module is missing. Somebody who imported it before has decided otherwise.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(kind.library)
    except ImportError as error:
        raise UsageError(f"engine {engine}: {kind.library} is not installed; pip install 'sentinode[{kind.extra}]'") from error


def _is_installed(engine: str) -> bool:
    try:
        library_of(engine)
    except UsageError:
        return False
    return True


def _problems(bundle: Bundle, engine: str, manifest: EngineManifest) -> list[str]:
    where, kind = f"engines/{engine}", ENGINES[engine]
    problems = []
    if manifest.engine != engine:
        problems.append(f"{where}: engine.json is of an engine {manifest.engine}")
    if manifest.bundle_digest != bundle.manifest.digest:
        problems.append(f"{where}: made for another bundle (digest {manifest.bundle_digest[:12]}…)")
    if manifest.largest_deviation > kind.limit:
        problems.append(f"{where}: its probabilities deviate by up to {manifest.largest_deviation:.3g}, more than {kind.limit:g}")
    if set(manifest.files) != set(kind.files):
        return [*problems, f"{where}: engine.json lists {', '.join(manifest.files) or 'nothing'}; expected {', '.join(kind.files)}"]
    for name, expected in manifest.files.items():
        file = engine_folder(bundle, engine) / name
        if not file.is_file():
            problems.append(f"{where}/{name}: missing")
        elif sha256_file(file) != expected:
            problems.append(f"{where}/{name}: sha256 differs from engine.json")
    return problems


def _read_files(bundle: Bundle, engine: str) -> dict[str, bytes]:
    """Return the very bytes whose checksums are in the manifest: libraries parse nothing else."""
    manifest = read_engine(bundle, engine)
    files = {name: (engine_folder(bundle, engine) / name).read_bytes() for name in manifest.files}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != manifest.files[name]:
            raise ManifestError(f"{bundle.where}: engines/{engine}/{name}: sha256 differs from engine.json")
    return files


def _onnxruntime_run(onnxruntime: ModuleType, files: dict[str, bytes], threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(files["model.onnx"], options, providers=["CPUExecutionProvider"])

    def run(inputs: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run([OUTPUT_NAME], {INPUT_NAME: np.ascontiguousarray(inputs.numpy())})
        return torch.from_numpy(logits)

    return run


def _openvino_run(openvino: ModuleType, files: dict[str, bytes], threads: int) -> Run:
    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # Where the processor has bfloat16, OpenVINO would compute in that.
        "INFERENCE_PRECISION_HINT": "f32",
        # Replicas on one machine would all pin their threads to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core.compile_model(core.read_model(files["model.xml"], files["model.bin"]), "CPU", settings)
    request, output = compiled.create_infer_request(), compiled.output(OUTPUT_NAME)

    def run(inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(request.infer({INPUT_NAME: np.ascontiguousarray(inputs.numpy())})[output])

    return run
