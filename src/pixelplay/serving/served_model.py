"""A loaded model: decoding in threads, prediction in batches, heat maps one at a time."""

import asyncio
import hashlib
import io
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from pixelplay.config import ComputeConfig, Tta, UncertaintyConfig
from pixelplay.data.decode import check_pixels, decode_image, silence_pillow
from pixelplay.data.transforms import describe_size
from pixelplay.errors import ConfigError, ImageError
from pixelplay.evaluation.novelty import NOVELTY_THRESHOLD
from pixelplay.inference.explain import Explainer
from pixelplay.inference.predictor import DECIMALS, Predictions, Predictor
from pixelplay.inference.sets_and_abstention import Uncertainty
from pixelplay.model.bundle import find_bundle
from pixelplay.model.device import share_cores
from pixelplay.model.features import LoadedImage
from pixelplay.outputs.explanations import OVERLAY_PX, overlay
from pixelplay.serving.batching import Batcher
from pixelplay.serving.problems import Problem
from pixelplay.serving.uploads import Upload
from pixelplay.thread_pool import default_workers

Row = dict[str, Any]
Result = TypeVar("Result")
ID_CHARS = 12  # of the hash that names a model


class ServedModel:
    """A model that answers requests from many clients.

    Args:
        run: folder of a run, or of its model.
        max_pixels: larger images get a row with the status "too_large".
        on_batch: called with the number of images of each batch, in any thread.

    Attributes:
        id: hash of the bundle, which names the model in answers.
        notes: sentences about abstention and prediction sets.

    Raises:
        BundleError, ConfigError, DataError: as `Predictor` and `Uncertainty`.
    """

    def __init__(
        self,
        run: str,
        compute: ComputeConfig,
        uncertainty: UncertaintyConfig,
        *,
        tta: Tta | None = None,
        max_pixels: float,
        on_batch: Callable[[int], object] = lambda n: None,
    ) -> None:
        with open(os.path.join(find_bundle(run), "bundle.json"), "rb") as file:
            self.id = hashlib.sha256(file.read()).hexdigest()[:ID_CHARS]
        self._predictor = Predictor(run, compute, tta=tta)
        self._uncertainty = Uncertainty(uncertainty, self._predictor.held_out)
        self.notes = tuple(self._uncertainty.notes)
        self._compute, self._max_pixels, self._on_batch = compute, max_pixels, on_batch
        self._explainer: Explainer | None = None
        self._explaining = threading.Lock()  # an Explainer has one set of hooks
        self._resources = ExitStack()
        is_cpu = self._predictor.device == "cpu"
        # each core processes its own batch, as in `map_on_cores`
        n_cores = self._resources.enter_context(share_cores()) if is_cpu else 1
        self._batcher: Batcher[tuple[str, LoadedImage], Row] = Batcher(
            self._predict_batch,
            batch_size=self._predictor.batch_size,
            n_threads=n_cores,
            initializer=(lambda: torch.set_num_threads(1)) if is_cpu else lambda: None,
        )
        self._resources.callback(self._batcher.close)
        n_decoders = compute.num_workers or default_workers()
        self._decoders = self._resources.enter_context(ThreadPoolExecutor(n_decoders, "decode"))
        self._warm_up()

    def close(self) -> None:
        """Finish what was accepted and end all threads."""
        self._resources.close()

    @property
    def is_ready(self) -> bool:
        """Return whether the threads that predict are running."""
        return self._batcher.is_alive

    def describe(self) -> dict[str, Any]:
        """Return the facts about the model that a client may know, JSON-ready."""
        bundle = self._predictor.bundle
        return {
            "model": self.id,
            "classes": list(bundle.classes),
            "backbone": bundle.backbone.name,
            "input_size": describe_size(bundle.preprocessing.input_size),
            "metric": bundle.metric,
            "novelty_threshold": NOVELTY_THRESHOLD,
            "made_by": bundle.made_by.get("pixelplay", ""),
            "device": self._predictor.device,
            "batch_size": self._predictor.batch_size,
            "notes": list(self.notes),
        }

    async def predict(self, uploads: Sequence[Upload]) -> list[Row]:
        """Decode images in threads and predict them in batches with those of other requests.

        If it is cancelled, what has not started is taken out of the queues.
        """
        loaded = await asyncio.gather(*(self._in_thread(partial(self._load, each)) for each in uploads))
        named = [(upload.name, image) for upload, image in zip(uploads, loaded, strict=True)]
        return list(await asyncio.gather(*map(asyncio.wrap_future, self._batcher.submit(named))))

    async def explain(self, upload: Upload, class_name: str | None) -> bytes:
        """Draw the evidence for a class (default: the predicted one) over an image, as PNG.

        Raises:
            Problem: 422 for an image, class or model that cannot be explained.
        """
        return await self._in_thread(partial(self._explain, upload, class_name))

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        """Make a call in a decoding thread."""

        def quietly() -> Result:
            with silence_pillow():
                return call()

        return await asyncio.get_running_loop().run_in_executor(self._decoders, quietly)

    def _warm_up(self) -> None:
        """Predict one image, so that the first request does not wait for memory and kernels."""
        height, width = self._predictor.bundle.preprocessing.input_size
        black = LoadedImage(pixels=np.zeros((height, width, 3), np.uint8))
        for future in self._batcher.submit([("", black)]):
            future.result()

    def _load(self, upload: Upload) -> LoadedImage:
        try:
            check_pixels(upload.content, path=upload.name, limit=self._max_pixels)
        except ImageError as error:
            return LoadedImage(error=error.detached())
        return self._predictor.load(upload.content, upload.name)

    def _predict_batch(self, batch: list[tuple[str, LoadedImage]]) -> list[Row]:
        self._on_batch(len(batch))
        names, images = zip(*batch, strict=True)
        return make_rows(self._uncertainty.apply(self._predictor.predict_batch(names, images)))

    def _explain(self, upload: Upload, class_name: str | None) -> bytes:
        try:
            check_pixels(upload.content, path=upload.name, limit=self._max_pixels)
            max_value = self._predictor.bundle.preprocessing.max_value
            pixels = decode_image(upload.content, path=upload.name, target_px=OVERLAY_PX, max_value=max_value)
            with self._explaining:
                if self._explainer is None:
                    self._explainer = Explainer(self._predictor.bundle, compute=self._compute)
                heat = self._explainer.explain(pixels, class_name).heat
        except ImageError as error:
            raise Problem(422, f"{error.status}: {error.reason}") from None
        except ConfigError as error:  # unknown class, or a network without feature maps
            raise Problem(422, str(error)) from None
        png = io.BytesIO()
        Image.fromarray(overlay(pixels, heat, max_px=OVERLAY_PX)).save(png, "PNG")
        return png.getvalue()


def make_rows(predictions: Predictions) -> list[Row]:
    """Return one JSON object per image, with numbers rounded as in predictions.csv."""
    columns = predictions.columns()
    columns["name"] = columns.pop("path")
    probs = {name: columns.pop(f"prob_{name}") for name in predictions.classes}
    rows = []
    for i in range(len(predictions)):
        row: Row = {"name": columns["name"][i]}
        row |= {name: _rounded(values[i]) for name, values in columns.items()}
        is_ok = row["prediction"] is not None
        row["probs"] = {name: _rounded(p[i]) for name, p in probs.items()} if is_ok else None
        rows.append(row)
    return rows


def _rounded(value: Any) -> Any:
    return round(float(value), DECIMALS) if isinstance(value, float) else value
