"""Bodies of the HTTP service, for its OpenAPI description."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from pixelplay.serving.problems import MEDIA_TYPE
from pixelplay.serving.uploads import FIELD


class PredictionRow(BaseModel):
    """The prediction of one image; without one, everything below `error` is null."""

    name: str = Field(description="File name as sent, without folders.")
    status: Literal["ok", "unreadable", "too_large", "unsupported"]
    error: str = Field(description="Why there is no prediction; empty otherwise.")
    prediction: str | None = Field(description="Predicted class.")
    probability: float | None = Field(description="Calibrated probability of the predicted class.")
    probs: dict[str, float] | None = Field(description="Calibrated probability of each class.")
    novelty: float | None = Field(description="Fraction of held-out images that are less unusual.")
    abstained: bool | None = Field(None, description="The model is not confident enough to predict.")
    prediction_set: list[str] | None = Field(None, description="Classes with the requested coverage.")


class PredictAnswer(BaseModel):
    """One row per image, in order."""

    model: str = Field(description="Hash that names the model.")
    predictions: list[PredictionRow]


class ModelDescription(BaseModel):
    """The model that answers, and the limits of the server."""

    model: str = Field(description="Hash that names the model.")
    classes: list[str]
    backbone: str
    input_size: str = Field(description="Side, or height x width, of the network's input in pixels.")
    metric: str = Field(description="Metric that the training selected for.")
    novelty_threshold: float = Field(description="Novelty from which an image is called unusual.")
    made_by: str = Field(description="Version of PixelPlay that trained the model.")
    device: str
    batch_size: int
    notes: list[str] = Field(description="Basis of abstention and prediction sets.")
    limits: dict[str, float]


class ServiceState(BaseModel):
    """State of the service."""

    status: Literal["ok"] = "ok"


class ReloadAnswer(BaseModel):
    """The model after a reload."""

    model: str = Field(description="Hash that names the model.")


class ProblemDetails(BaseModel):
    """An error, as in RFC 9457."""

    type: str
    title: str
    status: int
    detail: str = Field(description="What is wrong, and the limit or the remedy.")
    request_id: str


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the errors of a route."""
    content = {MEDIA_TYPE: {"schema": ProblemDetails.model_json_schema()}}
    return {status: {"description": _REASONS[status], "content": content} for status in statuses}


def upload_body(*, many: bool) -> dict[str, Any]:
    """Describe a body of one or several images."""
    file: dict[str, Any] = {"type": "string", "format": "binary"}
    field = {"type": "array", "items": file, "minItems": 1} if many else file
    form = {"type": "object", "properties": {FIELD: field}, "required": [FIELD]}
    content = {"multipart/form-data": {"schema": form}, "image/*": {"schema": file}}
    return {"requestBody": {"required": True, "content": content}}


_REASONS = {
    400: "Malformed body, or no images",
    401: "Token missing or wrong",
    403: "Not allowed from another origin, or without a token",
    408: "Request received too slowly",
    409: "The new model cannot be loaded",
    413: "Body too large, or too many images",
    415: "Unsupported content type",
    421: "Requested under another host name than localhost, from a server without a token",
    422: "The image or class cannot be explained",
    429: "Too many images in progress; Retry-After says when to try again",
    503: "Not ready",
    504: "Not answered in time",
}
