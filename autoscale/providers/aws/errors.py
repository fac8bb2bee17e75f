"""What an error of AWS means for a launch: ask later, ask for less, ask slower, or never again.

Codes: "Error codes for the Amazon EC2 API" of the EC2 API reference.
"""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from autoscale.providers.provider import LaunchRefused, Refusal

CAPACITY = (
    "InsufficientInstanceCapacity",
    "InsufficientCapacity",
    "InsufficientHostCapacity",
    "InsufficientFreeAddressesInSubnet",
    "InsufficientAddressCapacity",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
    "InsufficientCapacityOnHost",
)
QUOTA = (
    "MaxSpotInstanceCountExceeded",
    "VcpuLimitExceeded",
    "InstanceLimitExceeded",
    "MaxSpotFleetRequestCountExceeded",
    "FleetLimitExceeded",
    "ResourceLimitExceeded",
    "VolumeLimitExceeded",
    "MaxIOPSLimitExceeded",
)
THROTTLED = (
    "RequestLimitExceeded",
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "RequestThrottled",
    "RequestThrottledException",
    "TooManyRequestsException",
    "SlowDown",
    "EC2ThrottledException",
    "BandwidthLimitExceeded",
    "PriorRequestNotComplete",
)
ACCESS = (
    "UnauthorizedOperation",
    "AuthFailure",
    "AccessDenied",
    "AccessDeniedException",
    "Blocked",
    "OptInRequired",
    "PendingVerification",
    "InvalidClientTokenId",
    "ExpiredToken",
    "ExpiredTokenException",
    "SignatureDoesNotMatch",
    "RequestExpired",
    "UnrecognizedClientException",
)
MISTAKES = (
    "Unsupported",
    "UnsupportedOperation",
    "MissingParameter",
    "UnknownParameter",
    "MalformedQueryString",
    "ValidationError",
)
KINDS: Mapping[str, Refusal] = MappingProxyType(
    {
        **dict.fromkeys(CAPACITY, "capacity"),
        **dict.fromkeys(QUOTA, "quota"),
        **dict.fromkeys(THROTTLED, "throttled"),
        **dict.fromkeys((*ACCESS, *MISTAKES), "invalid"),
    }
)
UNKNOWN_EFFECT = ("InternalError", "InternalFailure", "ServiceUnavailable", "Unavailable")
NO_SUCH_MACHINE = ("InvalidInstanceID.NotFound", "InvalidInstanceID.Malformed")
RETRY_S: Mapping[Refusal, float] = MappingProxyType(
    {"capacity": 30.0, "quota": 300.0, "throttled": 20.0, "invalid": math.inf}
)
ACCESS_RETRY_S = 300.0  # permissions are put right while the controller runs
# The most hopeful first: where one pool of a mix has no room and another a mistake, room may come.
HOPE: tuple[Refusal, ...] = ("capacity", "throttled", "quota", "invalid")


def code_of(error: BaseException) -> str:
    """The code of an answer that is an error; "" where there was no answer."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return ""
    return str(response.get("Error", {}).get("Code", ""))


def kind_of(code: str) -> Refusal | None:
    """What a code says of a launch; None where it says nothing, and the effect is unknown."""
    if code in KINDS:
        return KINDS[code]
    # InvalidIdempotencyToken and its like are no statement about the machine of that token.
    if code.startswith("Invalid") and "Idempot" not in code:
        return "invalid"
    return None


def may_pass(error: BaseException) -> bool:
    """Whether the same call may well succeed a moment later: throttling, an error on their side, or
    a connection that broke. Every call made here is idempotent."""
    code = code_of(error)
    if code:
        return code in THROTTLED or code in UNKNOWN_EFFECT or _status(error) >= 500
    from botocore.exceptions import HTTPClientError
    from botocore.parsers import ResponseParserError

    return isinstance(error, HTTPClientError | ResponseParserError)


def refuses(error: BaseException) -> bool:
    """Whether this is an answer that says that nothing was done."""
    told = _status(error) < 500 and kind_of(code_of(error)) is not None
    return told or is_throttled(error)


def is_throttled(error: BaseException) -> bool:
    return code_of(error) in THROTTLED


def refusal(codes: Iterable[tuple[str, str]]) -> LaunchRefused | None:
    """The refusal that (code, message) pairs add up to; None where one of unknown effect is among
    them, or none says no."""
    told = {f"{code}: {message}": (kind_of(code), code) for code, message in codes}
    kinds = {kind for kind, _ in told.values()}
    if None in kinds or not kinds:
        return None
    kind = next(each for each in HOPE if each in kinds)
    retry_s = RETRY_S[kind]
    if kind == "invalid" and any(code in ACCESS for _, code in told.values()):
        retry_s = ACCESS_RETRY_S
    return LaunchRefused(kind, retry_s, "; ".join(sorted(told)))


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None) or {}  # None where the connection broke
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
