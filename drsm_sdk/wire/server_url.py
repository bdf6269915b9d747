"""Credentials in a NATS server's URL, percent-encoded as in any URL (RFC 3986, section 2.1)."""

from urllib.parse import ParseResult, unquote


class ServerUrl(ParseResult):
    """A URL whose user and password are what they stand for, not as they are written."""

    @property
    def username(self) -> str | None:
        return _read(super().username)

    @property
    def password(self) -> str | None:
        return _read(super().password)


def _read(text: str | None) -> str | None:
    return text if text is None else unquote(text)
