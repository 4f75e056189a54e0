"""The HTTP application: routes and what they share."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from pixelplay import __version__
from pixelplay.errors import PixelPlayError
from pixelplay.serving import schemas
from pixelplay.serving.access import AccessPolicy
from pixelplay.serving.admission import Admission
from pixelplay.serving.metrics import ServiceMetrics
from pixelplay.serving.middleware import RequestGuard, problem_response, write_log
from pixelplay.serving.pages import add_pages
from pixelplay.serving.problems import Problem
from pixelplay.serving.schemas import problems
from pixelplay.serving.served_model import ServedModel
from pixelplay.serving.settings import LimitsConfig
from pixelplay.serving.uploads import read_uploads

LoadModel = Callable[[Callable[[int], object]], ServedModel]  # from the callback for each batch
UPLOAD_PROBLEMS = (400, 401, 403, 408, 413, 415, 421, 429, 504)


class Service:
    """The current model, and what is in progress.

    Args:
        load: loads the model from its folder; called again for each reload.

    Raises:
        BundleError, ConfigError, DataError: the model cannot be loaded.
    """

    def __init__(self, load: LoadModel, limits: LimitsConfig) -> None:
        self.limits = limits
        self.admission = Admission(limits)
        self.metrics = ServiceMetrics(lambda: self.admission.n_images)
        self._load = load
        self._reloading = asyncio.Lock()
        self._users: dict[ServedModel, int] = {}  # requests in progress
        self.model = load(self.metrics.count_batch)

    @asynccontextmanager
    async def use_model(self, n_images: int) -> AsyncIterator[ServedModel]:
        """Admit n images and yield the current model, which stays open while the block runs.

        Raises:
            Problem: 429 if the queue is full, 504 if the block takes longer than the limit.
        """
        with self.admission.images(n_images):
            model = self.model
            self._users[model] = self._users.get(model, 0) + 1
            try:
                async with asyncio.timeout(self.limits.timeout):
                    yield model
            except TimeoutError:
                reason = f"no answer within {self.limits.timeout:g} s; send fewer images or try again later"
                raise Problem(504, reason) from None
            finally:
                self._users[model] -= 1
                if not self._users[model]:
                    del self._users[model]
                    if model is not self.model:
                        await asyncio.to_thread(model.close)

    async def reload(self) -> ServedModel:
        """Load the model again; requests in progress finish with the old one.

        Raises:
            PixelPlayError, OSError: the new model cannot be loaded; the old one stays.
        """
        async with self._reloading:
            old, self.model = self.model, await asyncio.to_thread(self._load, self.metrics.count_batch)
            write_log("reload", model=self.model.id, replaced=old.id)
            if old not in self._users:
                await asyncio.to_thread(old.close)
            return self.model


def create_app(
    load: LoadModel, policy: AccessPolicy, limits: LimitsConfig, *, log_requests: bool = True
) -> FastAPI:
    """Load the model and build the application; errors as `Service`."""
    service = Service(load, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.model.close)

    app = FastAPI(
        title="PixelPlay",
        version=__version__,
        description="Classify images with a trained model.",
        docs_url=None,  # FastAPI's pages load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
        responses=problems(401, 403, 421),
    )
    app.state.service = service
    _add_model_routes(app, service, policy)
    _add_state_routes(app, service)
    add_pages(app)
    _add_problem_handlers(app)
    app.add_middleware(RequestGuard, policy=policy, metrics=service.metrics, log_requests=log_requests)
    if policy.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=policy.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    return app


def _add_model_routes(app: FastAPI, service: Service, policy: AccessPolicy) -> None:
    limits = service.limits

    @app.post(
        "/v1/predict",
        response_model=schemas.PredictAnswer,
        responses=problems(*UPLOAD_PROBLEMS),
        openapi_extra=schemas.upload_body(many=True),
    )
    async def predict(request: Request) -> Response:
        """Classify images: one row each, in order, whether or not they can be read."""
        with service.admission.bytes() as received:
            uploads = await read_uploads(request, limits, received)
            request.state.n_images = len(uploads)
            async with service.use_model(len(uploads)) as model:
                rows = await model.predict(uploads)
        for row in rows:
            service.metrics.count_image(row["status"])
        return JSONResponse({"model": model.id, "predictions": rows})

    @app.post(
        "/v1/explain",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}, **problems(*UPLOAD_PROBLEMS, 422)},
        openapi_extra=schemas.upload_body(many=False),
    )
    async def explain(
        request: Request,
        class_name: str | None = Query(None, alias="class", description="Default: the predicted class."),
    ) -> Response:
        """Draw a heat map of the regions that support a class over an image."""
        with service.admission.bytes() as received:
            uploads = await read_uploads(request, limits, received)
            if len(uploads) > 1:
                raise Problem(400, f"{len(uploads)} images; send one to explain")
            request.state.n_images = 1
            async with service.use_model(1) as model:
                png = await model.explain(uploads[0], class_name)
        return Response(png, media_type="image/png")

    @app.get("/v1/model", response_model=schemas.ModelDescription)
    async def describe_model() -> Response:
        """Describe the model and the limits of the server."""
        shown = {name: getattr(limits, name) for name in ("max_upload_mb", "max_images", "max_megapixels")}
        return JSONResponse({**service.model.describe(), "limits": shown})

    @app.post("/v1/reload", response_model=schemas.ReloadAnswer, responses=problems(409))
    async def reload(request: Request) -> Response:
        """Load the model again from its folder; only with a token."""
        policy.check_token(request.headers)
        try:
            model = await service.reload()
        except (PixelPlayError, OSError) as error:
            write_log("reload failed", error=str(error))
            raise Problem(409, "the new model cannot be loaded; the server's log says why") from None
        return JSONResponse({"model": model.id})


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_model=schemas.ServiceState)
    async def healthz() -> Response:
        """Answer while the process runs."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", response_model=schemas.ServiceState, responses=problems(503))
    async def readyz() -> Response:
        """Answer 200 while the server can predict."""
        if not service.model.is_ready:
            raise Problem(503, "the model is not running; start the server again")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(service.metrics.render(), media_type=service.metrics.media_type)


def _add_problem_handlers(app: FastAPI) -> None:
    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return problem_response(error, request.state.request_id)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path[:200]
        reasons = {
            404: f"there is no {path!r} here; see /docs",
            405: f"{request.method} is not allowed for {path!r}",
        }
        detail = reasons.get(error.status_code, str(error.detail))
        return await on_problem(request, Problem(error.status_code, detail, headers=error.headers))

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return await on_problem(request, Problem(422, f"{where}: {first['msg']}"))

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_invalid)
