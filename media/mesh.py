"""Meshes, and the two forms in which they are sent."""

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

GLTF_FLOAT, GLTF_UNSIGNED_INT = 5126, 5125
GLTF_VERTICES, GLTF_INDICES = 34962, 34963  # what a buffer is for
GLTF_JSON, GLTF_BINARY = b"JSON", b"BIN\0"


@dataclass(frozen=True)
class Mesh:
    """positions: (num_vertices, 3); colours: the same, linear, from 0 to 1; triangles:
    (num_triangles, 3), of vertices."""

    positions: np.ndarray
    colours: np.ndarray
    triangles: np.ndarray


def encode_glb(mesh: Mesh) -> bytes:
    """Binary glTF 2.0 (https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html)."""
    # Shap-E's z points up, glTF's y.
    positions = (mesh.positions @ [[1, 0, 0], [0, 0, -1], [0, 1, 0]]).astype("<f4")
    arrays = (positions, mesh.colours.astype("<f4"), mesh.triangles.astype("<u4").reshape(-1))
    views: list[dict[str, Any]] = []
    accessors: list[dict[str, Any]] = []
    num_bytes = 0
    for array in arrays:
        is_indices = array.ndim == 1
        target = GLTF_INDICES if is_indices else GLTF_VERTICES
        views.append(
            {"buffer": 0, "byteOffset": num_bytes, "byteLength": array.nbytes, "target": target}
        )
        accessors.append(
            {
                "bufferView": len(accessors),
                "componentType": GLTF_UNSIGNED_INT if is_indices else GLTF_FLOAT,
                "count": len(array),
                "type": "SCALAR" if is_indices else "VEC3",
            }
        )
        num_bytes += array.nbytes
    accessors[0] |= {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
    primitive = {"attributes": {"POSITION": 0, "COLOR_0": 1}, "indices": 2, "material": 0}
    scene = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "materials": [{"doubleSided": True, "pbrMetallicRoughness": {"metallicFactor": 0}}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": num_bytes}],
    }
    described = json.dumps(scene).encode()
    described += b" " * (-len(described) % 4)
    binary = b"".join(array.tobytes() for array in arrays)  # of four bytes a number
    chunks = glb_chunk(GLTF_JSON, described) + glb_chunk(GLTF_BINARY, binary)
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def glb_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack("<I4s", len(content), kind) + content


def encode_ply(mesh: Mesh) -> bytes:
    """Binary PLY (http://paulbourke.net/dataformats/ply/), with colours as screens have them."""
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"element vertex {len(mesh.positions)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\n"
        f"element face {len(mesh.triangles)}\n"
        "property list uchar int vertex_indices\nend_header\n"
    )
    vertices = np.empty(len(mesh.positions), [("at", "<f4", 3), ("colour", "u1", 3)])
    vertices["at"] = mesh.positions
    vertices["colour"] = (srgb(mesh.colours) * 255).round()
    faces = np.empty(len(mesh.triangles), [("count", "u1"), ("of", "<i4", 3)])
    faces["count"], faces["of"] = 3, mesh.triangles
    return header.encode() + vertices.tobytes() + faces.tobytes()


def srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
