"""Making an engine from a network, and comparing it with torch."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sentinode.engines import INPUT_NAME, OUTPUT_NAME, Run, library_of
from sentinode.errors import SentinodeError, UsageError, one_line
from sentinode.images import UInt8Array
from sentinode.inference import network_logits
from sentinode.manifests import BundleManifest
from sentinode.preprocess import network_input
from sentinode.probability import calibrated_probability

FloatArray = npt.NDArray[np.float64]

_CALIBRATION_BATCH = 16


def onnx_bytes(model: nn.Module, input_size_px: int) -> bytes:
    """Return a network as ONNX, float32, for any number of patches; resizing and normalisation stay outside.

    Parameters
    ----------
    model : nn.Module
        On the CPU, in eval mode.
    input_size_px : int
        Side of its input.

    Raises
    ------
    UsageError
        The extra `onnx` is not installed.
    SentinodeError
        The network has an operation that ONNX lacks.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"export: {error.name} is not installed; pip install 'sentinode[onnx]'") from error
    example = torch.zeros(2, 3, input_size_px, input_size_px)
    # Deprecations inside the exporter are no concern of whoever exports.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim("patches")},),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise SentinodeError(f"the network cannot be exported to ONNX ({one_line(error)})") from error
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def write_engine(engine: str, model: nn.Module, bundle: BundleManifest, out: Path, calibration: UInt8Array) -> None:
    """Write the files of an engine, all but engine.json, into the folder `out`.

    Parameters
    ----------
    engine : str
        A key of ENGINES.
    model : nn.Module
        The bundle's network, on the CPU, in eval mode.
    bundle : BundleManifest
    out : Path
    calibration : ndarray of uint8, shape (n, patch_size_px, patch_size_px, 3), RGB
        Patches that the ranges of an int8 engine are taken from; not used for others.

    Raises
    ------
    UsageError, SentinodeError
        As `onnx_bytes`; UsageError also where the engine's library is not installed.
    """
    library = library_of(engine)
    onnx = onnx_bytes(model, bundle.input_size_px)
    if engine == "openvino":
        # In float32: OpenVINO stores half precision unless told otherwise.
        library.save_model(library.Core().read_model(onnx), out / "model.xml", compress_to_fp16=False)
    elif engine == "onnxruntime-int8":
        _quantise(onnx, out / "model.onnx", bundle, calibration)
    else:
        (out / "model.onnx").write_bytes(onnx)


def _quantise(model: bytes, out: Path, bundle: BundleManifest, patches: UInt8Array) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The patches as the network sees them, in batches."""

        def __init__(self) -> None:
            self._batches = self._all()

        def _all(self) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
            for start in range(0, len(patches), _CALIBRATION_BATCH):
                batch = torch.tensor(patches[start : start + _CALIBRATION_BATCH])
                yield {INPUT_NAME: network_input(batch, bundle.input_size_px, bundle.mean, bundle.std).numpy()}

        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            return next(self._batches, None)

    # By path: a model handed over in memory loses its weights on the way.
    exact, prepared = out.with_name("exact.onnx"), out.with_name("prepared.onnx")
    exact.write_bytes(model)
    quant_pre_process(exact, prepared, skip_symbolic_shape=True)
    # Weights of 7 bits: processors without VNNI add products of 8 bits in 16, which overflows.
    quantize_static(prepared, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True)
    for file in (exact, prepared):
        file.unlink()


def engine_logits(run: Run, bundle: BundleManifest, patches: UInt8Array, batch_size: int) -> npt.NDArray[np.float32]:
    """Return z1 - z0 of patches, float32 (n,), as the bundle's settings have it and `run` computes it."""
    return network_logits(run, patches, input_size_px=bundle.input_size_px, mean=bundle.mean, std=bundle.std, tta=bundle.tta, batch_size=batch_size)


def engine_probabilities(
    run: Run, bundle: BundleManifest, patches: UInt8Array, batch_size: int, show: Callable[[int], None] = lambda done: None
) -> FloatArray:
    """Return calibrated probabilities of patches, float64 (n,); `show(rows done)` is called after each ten batches or so."""
    step = 10 * batch_size
    parts = [np.empty(0)]
    for start in range(0, len(patches), step):
        logits = engine_logits(run, bundle, patches[start : start + step], batch_size)
        parts.append(calibrated_probability(logits, bundle.temperature, bundle.bias))
        show(min(start + step, len(patches)))
    return np.concatenate(parts)


def times_in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Call each function once for warming up, then all of them in turns `rounds` times; return the seconds of each timed call."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return times
