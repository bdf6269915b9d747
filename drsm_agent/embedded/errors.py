"""What can go wrong with embedded servers.

EmbeddedError
├── BinaryMissing    no mongod or nats-server was found
├── BinaryBroken     it was found but does not run
└── ServerFailed     it ran but did not become ready
    └── PortTaken    somebody else listens on its port
"""


class EmbeddedError(Exception):
    """The embedded servers cannot be had; the message says what to do."""


class BinaryMissing(EmbeddedError):
    """No executable was found, neither in the environment of this Python nor on PATH."""


class BinaryBroken(EmbeddedError):
    """The executable was found, but it does not run; mostly for want of a shared library."""


class ServerFailed(EmbeddedError):
    """A server ended or stayed silent before it was ready; the message carries the tail of its log."""


class PortTaken(ServerFailed):
    """The port that the server was to listen on is in use."""
