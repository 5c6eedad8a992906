"""Meshes as files, read by their formats' own rules."""

import json
import struct
from typing import Any

import numpy as np

from media.mesh import Mesh, encode_glb, encode_ply

TRIANGLE = Mesh(
    positions=np.array([[0, 0, 0], [1, 0, 0], [0, 2, 3]], np.float32),
    colours=np.array([[0, 0, 0], [1, 1, 1], [0.5, 0, 0.001]], np.float32),
    triangles=np.array([[0, 1, 2]]),
)


def read_glb(content: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Its description, and what its accessors show."""
    magic, version, length = struct.unpack_from("<4sII", content)
    assert (magic, version, length) == (b"glTF", 2, len(content))
    size, kind = struct.unpack_from("<I4s", content, 12)
    assert (size % 4, kind) == (0, b"JSON")
    described = json.loads(content[20 : 20 + size])
    binary_size, kind = struct.unpack_from("<I4s", content, 20 + size)
    binary = content[28 + size :]
    assert (len(binary), kind) == (binary_size, b"BIN\0")
    shown = []
    for accessor in described["accessors"]:
        view = described["bufferViews"][accessor["bufferView"]]
        part = binary[view["byteOffset"] :][: view["byteLength"]]
        shown.append(np.frombuffer(part, {5126: "<f4", 5125: "<u4"}[accessor["componentType"]]))
        assert len(shown[-1]) == accessor["count"] * {"VEC3": 3, "SCALAR": 1}[accessor["type"]]
    return described, shown


def test_glb_holds_the_mesh_with_its_y_upwards() -> None:
    described, (positions, colours, indices) = read_glb(encode_glb(TRIANGLE))
    assert positions.reshape(3, 3).tolist() == [[0, 0, 0], [1, 0, 0], [0, 3, -2]]
    assert described["accessors"][0]["max"] == [1, 3, 0]
    assert np.array_equal(colours.reshape(3, 3), TRIANGLE.colours)
    assert indices.tolist() == [0, 1, 2]


def test_ply_holds_the_mesh_with_colours_as_screens_have_them() -> None:
    header, _, rest = encode_ply(TRIANGLE).partition(b"end_header\n")
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\nelement vertex 3\n")
    vertices = np.frombuffer(rest, [("at", "<f4", 3), ("colour", "u1", 3)], 3)
    assert np.array_equal(vertices["at"], TRIANGLE.positions)
    assert vertices["colour"].tolist() == [[0, 0, 0], [255, 255, 255], [188, 0, 3]]
    assert struct.unpack("<B3i", rest[45:]) == (3, 0, 1, 2)
