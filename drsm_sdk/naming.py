"""Names that an application or an operator gives: checked once, refused with BadRequest."""

from drsm_sdk.errors import BadRequest
from drsm_sdk.wire.subjects import Subjects, valid_pool_name


def pool_name(name: str) -> str:
    """The name itself. Raises BadRequest for what cannot name a pool."""
    if not valid_pool_name(name):
        raise BadRequest(
            f"pool name: expected [a-z0-9][a-z0-9_-]{{0,31}} not beginning with drsm_, found {name!r:.60}"
        )
    return name


def domain(prefix: str) -> Subjects:
    """The subjects of the domain with this prefix. Raises BadRequest for what cannot be a prefix."""
    try:
        return Subjects(prefix)
    except ValueError as error:
        raise BadRequest(str(error)) from None
