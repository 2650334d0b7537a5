"""Bodies to bytes and back."""

from __future__ import annotations

import dataclasses
import math
import uuid
from decimal import Decimal
from typing import Any, TypedDict

import attrs
import msgspec
import pydantic
import pytest

from aioworkq.codec import BYTES, JSON, TEXT, codec_for
from aioworkq.errors import DecodeError
from aioworkq.message import Garbled


@dataclasses.dataclass
class Email:
    to: str
    copies: int = 1


@dataclasses.dataclass
class Strict:
    number: int

    def __post_init__(self) -> None:
        if self.number < 0:
            raise RuntimeError("negative")


class Movie(TypedDict):
    name: str


class Point(msgspec.Struct):
    x: int
    y: int


class Circle(msgspec.Struct, tag=True):
    radius: float


class Square(msgspec.Struct, tag=True):
    side: float


@attrs.define
class Car:
    wheels: int


class User(pydantic.BaseModel):
    name: str
    age: int = pydantic.Field(ge=0)


class Account(pydantic.BaseModel):
    user_id: int = pydantic.Field(alias="userId")
    likes: set[str] = set()


class Half(pydantic.BaseModel):
    user_id: int = pydantic.Field(0, validation_alias="userId")


class Whole(pydantic.BaseModel):
    user_id: int = pydantic.Field(validation_alias="userId")


USER_ID = {"userId": 7}


@dataclasses.dataclass
class Letter:
    sender: User


@pytest.mark.parametrize(
    ("body_type", "value", "content_type"),
    [
        (Email, Email("ada", 2), JSON),
        (Movie, {"name": "M"}, JSON),
        (Point, Point(1, 2), JSON),
        (Car, Car(4), JSON),
        (User, User(name="ada", age=3), JSON),
        (Account, Account(userId=7, likes={"a", "b", "c"}), JSON),
        (list[Account], [Account(userId=7)], JSON),
        (Letter, Letter(User(name="ada", age=3)), JSON),
        (list[User], [User(name="ada", age=3)], JSON),
        (Circle | Square, Square(2.5), JSON),
        (Email | None, None, JSON),
        (dict, {"a": [1, None, "x"]}, JSON),
        (dict[str, int], {"a": 1}, JSON),
        (list, [1, 2], JSON),
        (tuple[int, str], (1, "a"), JSON),
        (int, 5, JSON),
        (float, 2.5, JSON),
        (float, 2, JSON),
        (bool, True, JSON),
        (None, None, JSON),
        (Decimal, Decimal("1.50"), JSON),
        (str, "Grüße 🎉", TEXT),
        (str, "", TEXT),
        (bytes, b"\x00\xff", BYTES),
        (bytes, b"", BYTES),
        (Any, {"a": 1}, JSON),
        (Any, "text", TEXT),
        (Any, b"raw", BYTES),
        (Any, None, JSON),
        (object, [1], JSON),
    ],
)
def test_a_body_comes_back_as_it_went(body_type: Any, value: Any, content_type: str) -> None:
    """Every kind of body type makes the round trip."""
    codec = codec_for(body_type)
    encoded = codec.encode(value)
    assert encoded.content_type == content_type
    assert codec.decode(encoded.body, encoded.content_type) == value


@pytest.mark.parametrize(
    ("body_type", "value"),
    [
        (Email, {"to": "ada"}),
        (Email, Email("ada", "two")),  # type: ignore[arg-type]
        (Email, None),
        (Movie, {"title": "M"}),
        (Movie, "M"),
        (User, Email("ada")),
        (Circle | Square, Point(1, 2)),
        (list[int], ["a"]),
        (int, "5"),
        (str, b"bytes"),
        (bytes, "text"),
        (Any, object()),
        (Any, {1, 2j}),
        (dict, {"a": object()}),
    ],
)
def test_a_body_of_the_wrong_type_is_refused_where_it_is_published(
    body_type: Any,
    value: Any,
) -> None:
    """The producer hears of it, not a worker."""
    with pytest.raises((TypeError, ValueError)):
        codec_for(body_type).encode(value)


def test_the_refusal_names_both_types() -> None:
    """What was expected, what came."""
    with pytest.raises(TypeError, match="a body of this queue is Email, not str"):
        codec_for(Email).encode("hi")
    with pytest.raises(TypeError, match=r"not a valid Email: Expected `int`.*\$\.copies"):
        codec_for(Email).encode(Email("ada", "x"))  # type: ignore[arg-type]


def test_a_body_that_contains_itself_is_refused() -> None:
    """A ring has no JSON."""
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises((ValueError, TypeError)):
        codec_for(Any).encode(ring)


@dataclasses.dataclass
class Picky:
    """Looks for its value when it is made of JSON."""

    key: str

    def __post_init__(self) -> None:
        if self.key == "gone":
            raise LookupError("no such key")


def test_what_a_body_raises_when_it_is_checked_is_a_type_error() -> None:
    """Whatever it is: `publish_many` goes on with the next one."""
    body = Picky("there")
    body.key = "gone"
    with pytest.raises(TypeError, match="this body is not a valid Picky: no such key"):
        codec_for(Picky).encode(body)


def test_text_of_another_class_is_text() -> None:
    """A value that a handler read off a delivery can be published again."""

    class Text(str):
        __slots__ = ()

    for text in (Text("a"), Garbled(b"a\xff")):
        assert codec_for(dict).decode(codec_for(dict).encode({"t": text}).body, JSON) == {
            "t": str(text)
        }


def test_text_that_is_no_unicode_is_refused() -> None:
    """A lone surrogate has no UTF-8."""
    with pytest.raises(ValueError, match="UTF-8"):
        codec_for(str).encode("\ud800")


@pytest.mark.parametrize(
    ("body_type", "body", "content_type"),
    [
        (Email, b"{", JSON),
        (Email, b"{}", JSON),
        (Email, b'{"to": 1}', JSON),
        (Email, b"\xff", None),
        (Strict, b'{"number": -1}', JSON),
        (User, b'{"name": "ada", "age": -1}', JSON),
        (User, b"{", None),
        (Letter, b'{"sender": {"name": "ada", "age": -1}}', JSON),
        (Circle | Square, b'{"type": "Star"}', JSON),
        (str, b"\xff", TEXT),
        (str, b"1", JSON),
        (Any, b"{", JSON),
        (Any, b"\xff", TEXT),
        (Any, b"[" * 100_000, JSON),
        (list, b"[" * 100_000, JSON),
        (int, b"1.5", JSON),
    ],
)
def test_what_is_no_body_of_the_type_is_a_decode_error(
    body_type: Any,
    body: bytes,
    content_type: str | None,
) -> None:
    """Whatever the bytes are, and whatever a validator raises."""
    with pytest.raises(DecodeError) as caught:
        codec_for(body_type).decode(body, content_type)
    assert caught.value.reason


def test_foreign_messages_are_read_by_their_content_type() -> None:
    """Other clients publish text without quotes, JSON, or bytes without saying so."""
    assert codec_for(str).decode(b"Hello World!", None) == "Hello World!"
    assert codec_for(str).decode(b'"Hello"', "application/json; charset=utf-8") == "Hello"
    assert codec_for(Any).decode(b"Hello", None) == b"Hello"
    assert codec_for(Any).decode(b"Hello", "text/plain") == "Hello"
    assert codec_for(Any).decode(b"[1]", "application/vnd.api+json") == [1]
    assert codec_for(Email).decode(b'{"to": "ada"}', None) == Email("ada")
    assert codec_for(bytes).decode(b'{"to": "ada"}', JSON) == b'{"to": "ada"}'


def test_bytes_like_bodies_are_copied() -> None:
    """A buffer that its owner changes later does not change the message."""
    buffer = bytearray(b"abc")
    encoded = codec_for(bytes).encode(buffer)
    buffer[0] = 0
    assert encoded.body == b"abc"
    assert codec_for(Any).encode(memoryview(b"xyz")).body == b"xyz"


def test_a_codec_is_made_once() -> None:
    """Publishing looks it up for every message."""
    assert codec_for(Email) is codec_for(Email)


def test_a_type_that_has_no_bodies_is_refused() -> None:
    """Where the handler is registered."""
    with pytest.raises(TypeError, match="bodies cannot be of type"):
        codec_for(dict[int | bytes, Point | Email | Car])


def test_a_model_that_reads_other_names_than_it_writes_is_refused() -> None:
    """By the producer, before a worker misses a field, or takes its default."""
    with pytest.raises(TypeError, match="this Half would be another one when it is decoded"):
        codec_for(Half).encode(Half.model_validate(USER_ID))
    with pytest.raises(TypeError, match="this Whole could not be decoded again"):
        codec_for(Whole).encode(Whole.model_validate(USER_ID))
    unchecked = User.model_construct(name="ada", age=-1)
    with pytest.raises(TypeError, match="this User could not be decoded again"):
        codec_for(User).encode(unchecked)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_has_not_is_refused(number: float) -> None:
    """It would become null without a word."""
    for body_type, value in (
        (Any, number),
        (Any, {"a": [None, number]}),
        (float | None, number),
        (float, number),
    ):
        with pytest.raises((TypeError, ValueError)):
            codec_for(body_type).encode(value)
    fine = {"a": None, "b": "null", 3: [None, {uuid.uuid4(): 1}], "raw": msgspec.Raw(b"[]")}
    assert codec_for(Any).encode(fine).body.startswith(b'{"a":null')
