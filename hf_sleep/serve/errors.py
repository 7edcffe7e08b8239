"""Errors of a server, in OpenAI's shape."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}
"""Of an error, by its status; of others below 500 `invalid_request_error`, above it `server_error`."""
CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unsupported_parameter",
    "json_invalid": "invalid_json",
}
"""OpenAI's codes, by pydantic's."""


class ApiError(HTTPException):
    """An error that a client is told.

    Args:
        status: of HTTP.
        message: what is wrong, and what works.
        param: of the request.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The JSON that is answered."""
        usual = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status_code, usual)
        return {"error": {"message": str(self.detail), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The same as a response."""
        return JSONResponse(self.body(), self.status_code, self.headers)

    @classmethod
    def of(cls, error: HTTPException) -> "ApiError":
        """An error of the framework's: no such path, or no such method on it."""
        if isinstance(error, cls):
            return error
        return cls(error.status_code, str(error.detail), headers=error.headers)


class Gone(Exception):
    """Nobody waits for an answer any more; what was on its way is dropped."""


def refused(param: str, value: Any, what_works: str, code: str = "invalid_value") -> ApiError:
    """An error of one value, which is shown where it is short."""
    shown = f"={value!r}" if isinstance(value, bool | int | float) and abs(value) < 1e300 else ""
    return ApiError(400, f"{param}{shown}: {what_works}", param=param, code=code)


def of_validation(errors: Sequence[Any]) -> ApiError:
    """The first error that was found in a body; nothing of the body is said again."""
    first = errors[0]
    code = CODES.get(first["type"], "invalid_value")
    # Where several types would do, pydantic names each after the field, as code.
    param = ".".join(str(name) for name in first["loc"][1:] if re.fullmatch(r"\w+", str(name))) or None
    if code == "invalid_json":
        return ApiError(400, "the body is not JSON", code=code)
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if code == "unsupported_parameter":
        param = first["loc"][-1] if len(str(first["loc"][-1])) <= 64 else "…"
        message = "this server does not know it. Leave it out"
    return ApiError(400, f"{param or 'the body'}: {message}", param=None if param is None else str(param), code=code)
