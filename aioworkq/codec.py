"""Bodies to bytes and back, typed.

JSON through msgspec for everything but ``bytes`` (untouched) and ``str`` (plain UTF-8 text, so that
other clients read and write it without quotes). Pydantic models validate by their own rules, when
pydantic is installed; this module never imports it. A `Codec` of your own replaces all of this.
"""

from __future__ import annotations

import functools
import json
from typing import Any, Final, Protocol

import msgspec
from msgspec import Struct

from aioworkq.errors import DecodeError

JSON: Final = "application/json"
TEXT: Final = "text/plain"
BYTES: Final = "application/octet-stream"


class Encoded(Struct, frozen=True):
    """A body as it goes over the wire."""

    body: bytes
    content_type: str
    content_encoding: str | None = None


class Codec(Protocol):
    """How the bodies of one body type become bytes, and bytes such bodies."""

    def encode(self, value: Any) -> Encoded:
        """Encode one body.

        Raises:
            TypeError: The value is not of the body type, or cannot be encoded.
            ValueError: The same, where the type is right and the value is not.
        """
        ...

    def decode(self, body: bytes, content_type: str | None, /) -> Any:
        """Decode one body.

        Raises:
            DecodeError: The bytes are not a valid body of the type.
        """
        ...


@functools.lru_cache(maxsize=1024)
def _cached_codec(body_type: Any) -> Codec:
    return _make_codec(body_type)


def codec_for(body_type: Any) -> Codec:
    """Return the codec of a body type.

    Raises:
        TypeError: Bodies of this type can be neither encoded nor decoded.
    """
    try:
        return _cached_codec(body_type)
    except TypeError:
        # An unhashable type, or one that has no codec: then the same error comes again.
        return _make_codec(body_type)


def _make_codec(body_type: Any) -> Codec:
    if body_type is Any or body_type is object:
        return AnyCodec()
    if body_type is bytes:
        return BytesCodec()
    if body_type is str:
        return TextCodec()
    if _is_pydantic_model(body_type):
        return PydanticCodec(body_type)
    return JsonCodec(body_type)


class BytesCodec:
    """Bytes, untouched in both directions."""

    def encode(self, value: Any) -> Encoded:
        """Take bytes-like values as they are."""
        if isinstance(value, bytes):
            return Encoded(value, BYTES)
        if isinstance(value, bytearray | memoryview):
            return Encoded(bytes(value), BYTES)
        raise TypeError(f"a body of this queue is bytes, not {_name(type(value))}.")

    def decode(self, body: bytes, _content_type: str | None) -> bytes:
        """Return the body."""
        return body


class TextCodec:
    """Text as plain UTF-8. A body that says that it is JSON is read as JSON."""

    def encode(self, value: Any) -> Encoded:
        """Encode a str."""
        if not isinstance(value, str):
            raise TypeError(f"a body of this queue is str, not {_name(type(value))}.")
        return _text(value)

    def decode(self, body: bytes, content_type: str | None) -> str:
        """Return the text."""
        if _is_json(content_type):
            return str(_decode_json(_JSON_STR, body, "str"))
        return _decode_text(body)


class AnyCodec:
    """Whatever comes: bytes stay bytes, text stays text, everything else is JSON.

    The content type says which it was. A foreign message without one is given as bytes.
    """

    def encode(self, value: Any) -> Encoded:
        """Encode any value that is bytes, str or JSON."""
        if isinstance(value, bytes | bytearray | memoryview):
            return Encoded(bytes(value), BYTES)
        if isinstance(value, str):
            return _text(value)
        return Encoded(_encode_json(value), JSON, "utf-8")

    def decode(self, body: bytes, content_type: str | None) -> Any:
        """Decode by the content type."""
        if _is_json(content_type):
            return _decode_json(_JSON_ANY, body, "JSON document")
        if content_type is not None and content_type.startswith("text/"):
            return _decode_text(body)
        return body


class JsonCodec:
    """JSON of one type: dataclass, TypedDict, Struct, attrs class, union, builtin.

    What is published is checked by decoding it again, so that a producer hears of a wrong field
    and not a worker.
    """

    def __init__(self, body_type: Any) -> None:
        self._name = _name(body_type)
        try:
            self._decoder = msgspec.json.Decoder(body_type, dec_hook=_decode_foreign)
        except (TypeError, ValueError) as exc:
            raise TypeError(f"bodies cannot be of type {self._name}: {exc}") from exc
        if isinstance(body_type, type) and type(None) is not body_type:
            self._class: type | None = body_type if _is_checkable(body_type) else None
        else:
            self._class = None

    def encode(self, value: Any) -> Encoded:
        """Encode a value of the type, checked by decoding it."""
        if self._class is not None and not isinstance(value, self._class):
            raise TypeError(f"a body of this queue is {self._name}, not {_name(type(value))}.")
        body = _encode_json(value)
        try:
            self._decoder.decode(body)
        except Exception as exc:  # msgspec's own, and those of the type's __post_init__
            what = str(exc) or type(exc).__name__
            raise TypeError(f"this body is not a valid {self._name}: {what}.") from exc
        return Encoded(body, JSON, "utf-8")

    def decode(self, body: bytes, _content_type: str | None) -> Any:
        """Decode and check a body."""
        return _decode_json(self._decoder, body, self._name)


class PydanticCodec:
    """A pydantic model or dataclass, validated by pydantic's own rules for JSON.

    Its JSON has the aliases of its fields. What is published is checked by decoding it again.
    """

    def __init__(self, body_type: Any) -> None:
        import pydantic  # noqa: PLC0415 - an extra: only who uses its models has it

        self._type = body_type
        self._name = _name(body_type)
        self._adapter: Any = pydantic.TypeAdapter(body_type)

    def encode(self, value: Any) -> Encoded:
        """Encode an instance of the model."""
        if not isinstance(value, self._type):
            raise TypeError(f"a body of this queue is {self._name}, not {_name(type(value))}.")
        try:
            body: bytes = self._adapter.dump_json(value, by_alias=True)
        except Exception as exc:  # pydantic-core raises its own errors, and those of user code
            raise TypeError(f"this {self._name} cannot be encoded: {exc}.") from exc
        try:
            back = self._adapter.validate_json(body)
            is_same = self._adapter.dump_json(back, by_alias=True) == body or back == value
        except Exception as exc:
            raise TypeError(f"this {self._name} could not be decoded again: {exc}.") from exc
        if not is_same:
            raise TypeError(
                f"this {self._name} would be another one when it is decoded: its JSON is written "
                "by other names than it is read by.",
            )
        return Encoded(body, JSON, "utf-8")

    def decode(self, body: bytes, _content_type: str | None) -> Any:
        """Decode and validate a body."""
        try:
            return self._adapter.validate_json(body)
        except Exception as exc:  # ValidationError, and what validators of users raise
            raise DecodeError(self._name, reason=str(exc)) from exc


_JSON_ANY: Final = msgspec.json.Decoder()
_STRICT_JSON: Final = json.JSONEncoder(allow_nan=False)
_JSON_STR: Final = msgspec.json.Decoder(str)


def _text(value: str) -> Encoded:
    try:
        return Encoded(value.encode(), TEXT, "utf-8")
    except UnicodeEncodeError as exc:
        raise ValueError(f"this text cannot be encoded as UTF-8: {exc}.") from exc


def _decode_text(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as exc:
        raise DecodeError("str", reason=str(exc)) from exc


def _encode_json(value: Any) -> bytes:
    try:
        body = msgspec.json.encode(value, enc_hook=_encode_foreign)
        if b"null" in body:
            _refuse_nan(value)
        return body
    except RecursionError as exc:
        raise ValueError("a body that contains itself cannot be encoded.") from exc
    except Exception as exc:  # msgspec's own, and those of what serializes a model in it
        what = str(exc) or type(exc).__name__
        raise TypeError(f"a body of type {_name(type(value))} cannot be encoded: {what}.") from exc


def _refuse_nan(value: Any) -> None:
    """Refuse NaN and infinity, which msgspec would write as null.

    Raises:
        ValueError: There is one.
    """

    def encode(part: Any) -> Any:
        return None if isinstance(part, msgspec.Raw) else _encode_foreign(part)

    _STRICT_JSON.encode(msgspec.to_builtins(value, enc_hook=encode, str_keys=True))


def _decode_json(decoder: msgspec.json.Decoder[Any], body: bytes, name: str) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, ValueError, TypeError) as exc:
        raise DecodeError(name, reason=str(exc)) from exc
    except RecursionError as exc:
        raise DecodeError(name, reason="it is nested too deeply") from exc
    except Exception as exc:  # a __post_init__ or validator of the user's type
        raise DecodeError(name, reason=f"{type(exc).__name__}: {exc}") from exc


def _encode_foreign(value: Any) -> Any:
    if _is_pydantic_model(type(value)):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, str):  # of a class of its own, which msgspec does not take
        return str(value)
    raise TypeError(f"{_name(type(value))} has no JSON")


def _decode_foreign(kind: type, value: Any) -> Any:
    if _is_pydantic_model(kind):
        return _model_class(kind).model_validate(value)
    raise TypeError(f"{_name(kind)} cannot be made of JSON")


def _model_class(kind: Any) -> Any:
    return kind


def _is_pydantic_model(kind: Any) -> bool:
    return isinstance(kind, type) and hasattr(kind, "__pydantic_validator__")


def _is_checkable(kind: type) -> bool:
    """Say whether isinstance answers for this class (it refuses for TypedDicts and protocols)."""
    try:
        isinstance(None, kind)
    except TypeError:
        return False
    return kind is not float  # an int is a valid float


def _is_json(content_type: str | None) -> bool:
    return content_type is not None and (
        content_type.startswith(JSON) or content_type.partition(";")[0].endswith("+json")
    )


def _name(kind: Any) -> str:
    return getattr(kind, "__qualname__", None) or str(kind)
