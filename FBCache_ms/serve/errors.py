"""What a client is told that gets no picture: {"error": {"message", "type", "param", "code"}}, as OpenAI has it."""

from starlette.responses import JSONResponse

CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    499: "cancelled",
    500: "internal_error",
    501: "not_implemented",
    503: "unavailable",
    504: "timeout",
}
"""The code of an error that brings none of its own, by status."""


class ApiError(Exception):
    """An answer that is no picture.

    Args:
        status: of HTTP, one of CODES.
        message: what is wrong and what would be right, in a sentence.
        param: the field that it is about, such as "fbcache.stats"; None for none.
        code: a word for programs; CODES says what it is unless it is given.
        retry_after: seconds after which it is worth another try; None where no other try helps.
        allow: the methods that the address has, of a 405.
    """

    def __init__(self, status, message, param=None, code=None, retry_after=None, allow=None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.retry_after, self.allow = code or CODES[status], retry_after, allow

    @property
    def type(self):
        """OpenAI's word for whose fault it is."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self):
        """What is sent, as a dictionary."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self):
        """What is sent, with its headers."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(round(self.retry_after), 1))
        if self.allow is not None:
            headers["Allow"] = self.allow
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)
