"""The application: it lists adapters, and answers images that are sent to one of them.

GET  /adapters                  the names, tasks and classes of all
POST /adapters/NAME/predict     an encoded image as the body; labels as JSON, or a mask as PNG
GET  /health
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from io import BytesIO
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.requests import ClientDisconnect
from torch import Tensor
from torchvision.transforms.v2 import functional

from lora_plugins.errors import LoraError
from lora_plugins.tasks.errors import DataError, WeightsError
from lora_plugins.tasks.files import as_png, as_rgb, decode_image
from lora_plugins.tasks.inference import most_probable, resized
from lora_plugins.tasks.segmentation import MAX_CLASSES, class_colors, palette_image
from lora_plugins.tasks.serving.described import Described, ReplacedError
from lora_plugins.tasks.serving.engine import ClosedError, Engine
from lora_plugins.tasks.serving.shelf import UnknownAdapterError

UPLOAD = "the image"

PROGRAMS = frozenset({"EPS"})
"""What Pillow hands to another program, Ghostscript, which would run whatever somebody sends."""


class _TooLargeError(LoraError, ValueError):
    """An upload is larger than is allowed."""


STATUS: Mapping[type[Exception], int] = {
    UnknownAdapterError: 404,
    DataError: 400,
    _TooLargeError: 413,
    ClosedError: 503,
    ReplacedError: 503,
}
"""By kind of error; others of ours are those of an adapter that cannot be used."""

UNUSABLE = 422

PROBLEM = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}
ANSWERS: Mapping[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}}},
    **{code: {"content": {"application/json": {"schema": PROBLEM}}} for code in (*STATUS.values(), UNUSABLE)},
}
"""What is answered beside JSON, and of errors."""

UPLOADED: Mapping[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
"""The body, for the page /docs and for generated clients: FastAPI knows of none, as it is read while it comes."""

TRIES = 10
"""How often a request is computed anew whose adapter is replaced meanwhile."""


def make_app(engine: Engine, *, max_bytes: int = 10 * 2**20, max_pixels: int = 50_000_000) -> FastAPI:
    """Makes the application; when its server stops, the engine answers waiting requests and closes.

    Uploads have at most `max_bytes`, and images, decoded, `max_pixels`.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="lora_plugins", lifespan=life)

    @app.exception_handler(LoraError)
    async def told(_: Request, error: LoraError) -> JSONResponse:
        status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), UNUSABLE)
        return JSONResponse({"detail": str(error)}, status)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # which nobody reads

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/adapters")
    def adapters() -> list[dict[str, Any]]:
        return [_summary(engine, name) for name in engine.shelf.names()]

    @app.post("/adapters/{name}/predict", openapi_extra={**UPLOADED}, responses={**ANSWERS})
    async def predict(name: str, request: Request) -> Response:
        described = await run_in_threadpool(engine.shelf.describe, name)
        body = await _body(request, max_bytes)
        for _ in range(TRIES):
            with suppress(ReplacedError):
                return await _predicted(engine, described, body, max_pixels)
            described = await run_in_threadpool(engine.shelf.describe, name)
        return await _predicted(engine, described, body, max_pixels)

    return app


async def _predicted(engine: Engine, described: Described, body: bytes, max_pixels: int) -> Response:
    image, size = await run_in_threadpool(_prepared, described, body, max_pixels)
    logits = await asyncio.wrap_future(engine.submit(described, image))
    return await run_in_threadpool(_answer, described, logits, size)


def _summary(engine: Engine, name: str) -> dict[str, Any]:
    try:
        described = engine.shelf.describe(name)
    except LoraError as error:
        return {"name": name, "problem": str(error)}
    return {
        "name": name,
        "task": str(described.provenance["class"]).rpartition(".")[2],
        "classes": _classes(described),
        "loaded": name in engine.shelf.loaded(),
    }


def _classes(described: Described) -> list[str]:
    arguments = described.provenance["arguments"]
    return arguments.get("class_names") or [str(at) for at in range(arguments["model"]["num_classes"])]


async def _body(request: Request, limit: int) -> bytes:
    """Reads the body, and no more of it than is allowed."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > limit:
            raise _TooLargeError(f"{UPLOAD} has more than the {limit} bytes that are allowed.")
    return bytes(found)


def _prepared(described: Described, body: bytes, max_pixels: int) -> tuple[Tensor, tuple[int, int]]:
    """The image as the task takes it, and the height and width of a mask of it."""
    provenance = described.provenance
    decoded = _decoded(body, max_pixels, None if described.has_masks else provenance["image_size"])
    tensor: Tensor = functional.pil_to_tensor(decoded)
    return resized(tensor, provenance["image_size"], provenance["interpolation"]), (decoded.height, decoded.width)


def _decoded(body: bytes, max_pixels: int, resized_to: Sequence[int] | None) -> Image.Image:
    try:
        with Image.open(BytesIO(body)) as opened:
            pixels, kind = opened.width * opened.height, opened.format
        if kind in PROGRAMS:
            raise DataError(f"{UPLOAD} is of the format {kind}, which is a program. Send another, such as PNG or JPEG.")
        if pixels > max_pixels:
            raise _TooLargeError(f"{UPLOAD} has {pixels} pixels, more than the {max_pixels} that are allowed.")
        return as_rgb(decode_image(BytesIO(body), UPLOAD, resized_to), UPLOAD)
    except LoraError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _TooLargeError(
            f"{UPLOAD} has more pixels than the {max_pixels} that are allowed, or than Pillow opens."
        ) from error
    except Exception as error:  # decoders raise anything
        raise DataError(f"{UPLOAD} cannot be read: send an encoded image, such as PNG or JPEG, as the body.") from error


def _answer(described: Described, logits: Tensor, size: tuple[int, int]) -> Response:
    probabilities = logits.float().softmax(0)
    if probabilities.isnan().any():
        raise WeightsError(
            f"The adapter {described.name!r} answers with NaN: values of it or of its base are NaN or overflow, as "
            "after a training that diverged. Train it again, or take an earlier one of its run."
        )
    if described.has_masks:
        if len(logits) > MAX_CLASSES:
            raise WeightsError(
                f"The adapter {described.name!r} has {len(logits)} classes; an 8-bit mask holds at most {MAX_CLASSES}."
            )
        mask = palette_image(most_probable(probabilities, size).numpy(), class_colors(len(probabilities)))
        return Response(as_png(mask), media_type="image/png")
    names, values = _classes(described), probabilities.tolist()
    best = max(range(len(values)), key=values.__getitem__)
    return JSONResponse(
        {"adapter": described.name, "label": names[best], "probabilities": dict(zip(names, values, strict=True))}
    )
