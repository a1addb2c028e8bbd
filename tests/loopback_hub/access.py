"""Who may do what, and the answers to those who may not, as the Hub words them."""

from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import JSONResponse


@dataclass
class User:
    name: str
    orgs: dict[str, str] = field(default_factory=dict)
    role: str = "write"
    expired: bool = False

    def may(self, access: str, namespace: str) -> bool:
        """Whether this token reads or writes in a namespace."""
        right = "write" if namespace == self.name else self.orgs.get(namespace)
        return right is not None and (access == "read" or (right == "write" and self.role == "write"))


class Refused(Exception):
    """An answer that ends a request."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code

    def response(self) -> JSONResponse:
        headers = {"X-Error-Message": self.message} | ({"X-Error-Code": self.code} if self.code else {})
        return JSONResponse({"error": self.message}, self.status, headers)


def user_of(request: Request, users: dict[str, User]) -> User | None:
    """Whose token a request carries; None is a stranger. Raises Refused for a token that is not valid."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    user = users.get(header.removeprefix("Bearer "))
    if user is None or user.expired:
        message = "User Access Token is expired" if user else "Invalid credentials in Authorization header"
        raise Refused(401, message)
    return user
