"""The server's own description: the schema at `/openapi.json`, from the shapes that requests are checked against."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from outsize.serve.shapes import BODIES, ErrorBody

ERRORS = {
    400: "A parameter is wrong, or prompt and answer are longer than the context; `param` names it",
    401: "The API key is not known",
    404: "There is no such model",
    413: "The request is too large",
    429: "Too many wait already; `Retry-After` says when to try again",
    503: "The answer was not finished in time, or the engine has stopped",
}
SCHEMAS = "#/components/schemas/"


def answers(*errors: int) -> dict[int | str, dict[str, Any]]:
    """An endpoint's responses beside 200."""
    content = {"application/json": {"schema": {"$ref": f"{SCHEMAS}ErrorBody"}}}
    return {status: {"description": ERRORS[status], "content": content} for status in errors}


def takes(shape: type, streams: bool = False) -> dict[str, Any]:
    """An endpoint's request body; one that `streams` answers with server-sent events when that is asked for."""
    content = {"application/json": {"schema": {"$ref": f"{SCHEMAS}{shape.__name__}"}}}
    answer = (
        {"responses": {"200": {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}} if streams else {}
    )
    return {"requestBody": {"required": True, "content": content}, **answer}


def takes_path(name: str) -> dict[str, Any]:
    """An endpoint's parameter in its path."""
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]}


TEXT = {"responses": {"200": {"content": {"text/plain": {"schema": {"type": "string"}}}}}}


def complete(schema: dict[str, Any], model: str, vocabulary: int, context: int, keys: bool) -> None:
    """Add to the framework's description what it does not know: bodies, the one model there is and its limits, who may
    ask."""
    _, found = models_json_schema(
        [(shape, "validation") for shape in (*BODIES, ErrorBody)], ref_template=SCHEMAS + "{model}"
    )
    for shape in found["$defs"].values():
        for name, about in shape.get("properties", {}).items():
            if name == "model":
                about["enum"] = [model]
            elif name in ("max_tokens", "max_completion_tokens"):
                _limit(about, context - 1)
            elif name == "prompt":
                _limit(about, vocabulary - 1)
    parts = schema["components"] = {"schemas": found["$defs"]}
    if keys:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]


def _limit(about: dict[str, Any], most: int) -> None:
    """Say that no integer in a schema is larger."""
    if about.get("type") == "integer":
        about["maximum"] = most
    for inner in (*about.get("anyOf", ()), *filter(None, [about.get("items")])):
        _limit(inner, most)
