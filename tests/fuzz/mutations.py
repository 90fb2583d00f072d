"""Mutated samples, as a hypothesis strategy: cut, flipped, repeated, grown numbers, and pieces of other samples."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from fuzz.target import INPUT_BYTES_MAX, Target

# Bytes that decoders take for lengths, signs, ends and depths.
_TELLING = (
    b"", b"\0", b"\xff", b"\x7f", b"\x80" * 9 + b"\x01", b"\xff" * 4, b"\xff" * 8, b"\xff" * 9 + b"\x01",
    b"\0\0\0\x80", b"\0" * 8, b"\x01" + b"\0" * 7, b"\n" * 40, b"\x92\x01" * 200, b"\xf0\x9f\x98\x80",
)  # fmt: skip
_TELLING_TEXT = (
    "", "\0", "\n", '"', "'", "\\", "[" * 2_000, "{" * 50, '{"a":' * 2_000, "9" * 400, "9" * 5_000, "-1", "1e999",
    "nan", "inf", "NaN", "Infinity", "null", "true", "[]", "{}", '""', "\\ud800", "\\u0000", "\ufeff", "=", "é",
    "18446744073709551616", "[[primary]]", "# ", ",", ".", "..", "/", "-----BEGIN ", "٣",
)  # fmt: skip


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Mutated samples of a target, and now and then something of no sample at all."""
    samples = target.samples()
    if target.is_text:
        anything = st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
        return st.one_of(_mutated(samples, tuple(text.encode() for text in _TELLING_TEXT)), anything)
    return st.one_of(_mutated(samples, _TELLING), _mutated(samples, _TELLING), st.binary(max_size=200))


@st.composite
def _mutated(draw: st.DrawFn, samples: Sequence[bytes], telling: Sequence[bytes]) -> bytes:
    data = draw(st.sampled_from(samples))
    for _ in range(draw(st.integers(0, 4))):
        data = _edited(draw, data, samples, telling)
    return data


def _edited(draw: st.DrawFn, data: bytes, samples: Sequence[bytes], telling: Sequence[bytes]) -> bytes:
    """One piece of ``data`` replaced: by nothing, other bits, itself twice, telling bytes, or a piece of a sample."""
    start = draw(st.integers(0, len(data)))
    end = min(start + draw(st.sampled_from((0, 1, 1, 2, 4, 8, 32, len(data)))), len(data))
    piece = data[start:end]
    match draw(st.sampled_from(("cut", "flip", "repeat", "tell", "splice"))):
        case "flip":
            piece = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in piece[:8]) + piece[8:]
        case "repeat":
            piece *= draw(st.sampled_from((2, 3, 100)))
        case "tell":
            piece = draw(st.sampled_from(telling))
        case "splice":
            other = draw(st.sampled_from(samples))
            at = draw(st.integers(0, len(other)))
            piece = other[at : at + max(len(piece), 8)]
        case _:
            piece = b""
    return (data[:start] + piece + data[end:])[:INPUT_BYTES_MAX]
