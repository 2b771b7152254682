"""What an S3 store says about an object, in a bounded time and in words that tell its reasons apart.

Streaming 0.13.0 says "not found" of a wrong key, a missing bucket and a missing object alike, and waits minutes
for an endpoint that accepts connections and never answers.
"""

from __future__ import annotations

import os
from contextlib import closing
from typing import Any
from urllib.parse import urlparse

from ..models.errors import UserError
from .messages import first_line, shown

CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 10, 20, 2
"""Most time for a connection, for an answer, and how often each request is made."""

KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)"
_REASONS = {
    "InvalidAccessKeyId": f"the store does not know this access key; set {KEYS} for {{endpoint}}",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key; set AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; renew them (AWS_SESSION_TOKEN)",
    "InvalidToken": "the session token is not valid; renew or unset AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "the clock of this machine is off; set it",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_DEFAULT_REGION",
    "AccessDenied": f"access denied: these credentials may not read it; set {KEYS} of who may, or have it allowed "
    "(stores that hide what is missing say this of a missing object, too)",
}  # fmt: skip


class Unreachable(UserError):
    """From here, or as who we are, it cannot be read; from elsewhere it may."""


def object_bytes(address: str) -> int | None:
    """Size of an object at ``s3://bucket/key``, by a HEAD request.

    Returns:
        Its bytes; None where the store answers in a way that only a download will explain.

    Raises:
        Unreachable: no answer, or wrong or insufficient credentials.
        UserError: there is no such bucket or object, or the address is none.
    """
    from boto3.session import Session
    from botocore import exceptions
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries={"total_max_attempts": ATTEMPTS}
    )
    try:
        client = Session().client("s3", config=config, endpoint_url=os.environ.get("S3_ENDPOINT_URL"))
    except ValueError as error:
        raise UserError("S3_ENDPOINT_URL is no address; use http(s)://host:port") from error
    except exceptions.BotoCoreError as error:  # a profile (AWS_PROFILE) or region that is not there
        raise Unreachable(f"{shown(address)}: {first_line(error)}") from error
    bucket, key = urlparse(address).netloc, urlparse(address).path.lstrip("/")
    try:
        with closing(client):
            return _size(client, bucket, key, address)
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise Unreachable(f"{shown(address)}: no credentials; set {KEYS}") from error
    except exceptions.ParamValidationError as error:
        raise UserError(f"{shown(address)}: '{bucket}' is no name of a bucket") from error
    except (exceptions.ConnectTimeoutError, exceptions.ReadTimeoutError) as error:
        raise Unreachable(
            f"{shown(address)}: {_endpoint(client)} does not answer (waited {ATTEMPTS} times); is S3_ENDPOINT_URL right?"
        ) from error
    except (exceptions.ConnectionError, exceptions.HTTPClientError) as error:  # refused, no such host, TLS
        raise Unreachable(
            f"{shown(address)}: cannot connect to {_endpoint(client)} ({type(error).__name__}); set S3_ENDPOINT_URL, "
            "or start the store"
        ) from error
    except exceptions.BotoCoreError as error:
        raise Unreachable(f"{shown(address)}: {first_line(error)}") from error


def _endpoint(client: Any) -> str:
    return shown(str(client.meta.endpoint_url))


def _size(client: Any, bucket: str, key: str, address: str) -> int | None:
    from botocore.exceptions import ClientError

    payers = [n.strip() for n in os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")]
    asked: dict[str, Any] = {"Bucket": bucket, "Key": key}
    if bucket in payers:
        asked["RequestPayer"] = "requester"
    try:
        return int(client.head_object(**asked)["ContentLength"])
    except ClientError as error:
        status, code = _answer(error)
    place = f"{shown(address)}: "
    if status == 404:
        if _has_bucket(client, bucket):
            raise UserError(f"{place}no such object in bucket '{bucket}'; is it written, and the path right?")
        raise UserError(
            f"{place}no bucket '{bucket}' at {_endpoint(client)}; make it, or set S3_ENDPOINT_URL to the store that has it"
        )
    # The answer to HEAD has no text, so the reason is asked for.
    try:
        client.get_object(**asked, Range="bytes=0-0")["Body"].close()
        return None  # it can be read all the same
    except ClientError as error:
        status, code = _answer(error)
    if status == 403 and code not in _REASONS:
        code = "AccessDenied"
    if code in _REASONS:
        raise Unreachable(place + _REASONS[code].format(endpoint=_endpoint(client)))
    if status >= 500:
        raise Unreachable(f"{place}{_endpoint(client)} answers {status} ({code}); try again later")
    if status == 400:
        return None  # Streaming tries such an object without credentials
    raise UserError(f"{place}{_endpoint(client)} answers {status} ({code})")


def _has_bucket(client: Any, bucket: str) -> bool:
    """Whether a bucket is there; if it may not be looked at, it is."""
    from botocore.exceptions import ClientError

    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        return _answer(error)[0] != 404
    return True


def _answer(error: Any) -> tuple[int, str]:
    """Status and code of a store's refusal; never its text, which may repeat what it was sent."""
    response = error.response
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
    return int(status), code if code.isalnum() else "?"
