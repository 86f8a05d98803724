"""Feed malformed and odd image and PSF files to the loaders.

Run by hand, on Linux: python tests/corpus.py. The same files every time, made in a
temporary folder and read in a child process: each must give what the scripts can use,
or one line of utils.InputError, within 10 s and 1 GiB. The exit
status is 1 where one does not.
"""

import collections
import io
import itertools
import multiprocessing
import resource
import struct
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cv2
import numpy as np
import scipy.io
import scipy.sparse
import tifffile
from PIL import Image

import pictures
import utils

SECONDS, GIB = 10, 2**20  # the latter in KiB, as getrusage counts
# Sides that a header may claim: absurd, over OpenCV's limits, and just below its number
# of pixels.
HUGE = [(2**31 - 1,) * 2, (65500, 65500), (2**20 + 1, 9), (2**14, 2**13), (9, 2**20)]


class Bomb:
    """An object whose unpickling makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        """Have pickle open the file."""
        return open, (str(self.marker), "w")


def written(write, *args, **kwargs):
    """Return the bytes that a function writes to a file, its first argument."""
    buffer = io.BytesIO()
    write(buffer, *args, **kwargs)
    return buffer.getvalue()


def zeros(count, head=b""):
    """Compress some bytes and many zeros, a mebibyte at a time."""
    packer = zlib.compressobj(1)
    parts = [packer.compress(head)]
    parts += [packer.compress(bytes(2**20)) for _ in range(count >> 20)]
    return b"".join([*parts, packer.compress(bytes(count % 2**20)), packer.flush()])


def png(width, height, depth, colour, data, extra=b""):
    """Write a PNG with a header of any contents and the right check sums."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [b"IHDR" + header, extra, b"PLTE" + bytes(range(48))]
    chunks = [c for c in (*chunks, b"IDAT" + data, b"IEND") if c]
    packed = (
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
        for c in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(width, height, bits=8, samples=1, kind=1, data=bytes(1600), loop=False):
    """Write a TIFF of one strip with tags of any contents; loop: it follows itself."""
    tags = {256: width, 257: height, 258: bits, 259: 8 if data[0] == 0x78 else 1}
    tags |= {262: 2 if samples > 2 else 1, 273: 8, 277: samples, 278: height}
    tags |= {279: len(data), 339: kind}
    start = 8 + len(data)
    entries = b"".join(struct.pack("<HHII", k, 4, 1, v) for k, v in tags.items())
    head = struct.pack("<4sI", b"II*\0", start) + data + struct.pack("<H", len(tags))
    return head + entries + struct.pack("<I", start * loop)


def mat(rows, columns, count, packed):
    """Write a MATLAB file of a matrix of zeros `kernel` with `count` bytes of data."""
    body = struct.pack("<6I2i", 6, 8, 6, 0, 5, 8, rows, columns)
    body += struct.pack("<2I8s2I", 1, 6, b"kernel", 9, count)
    body = struct.pack("<2I", 14, min(len(body) + count, 2**32 - 1)) + body
    if packed:
        data = zeros(packed, body)
        body = struct.pack("<2I", 15, len(data)) + data
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + body


def pixels(rng, dtype, channels, height=37, width=41):
    """Random pixels, (H, W) or (H, W, channels)."""
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    top = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    return (rng.random(shape) * top).astype(dtype)


def damaged(rng, files):
    """Yield whole files, and each cut, and with bits flipped in its head or anywhere."""
    for name, data in files:
        stem, _, suffix = name.partition(".")
        yield f"{stem}.{suffix}", data
        for n in range(12):
            bits = np.unpackbits(np.frombuffer(data, np.uint8))
            end = min(len(bits), 2048) if n % 2 else len(bits)
            bits[rng.integers(0, end, 1 + n // 4)] ^= 1
            cut = int(rng.integers(1, len(data)))
            wrong = data[:cut] if n < 3 else np.packbits(bits).tobytes()
            yield f"{stem}-{'cut' if n < 3 else 'flipped'}{n}.{suffix}", wrong


def tiffs(rng):
    """Return names and contents of TIFFs as microscopes, scanners and editors write them."""
    gray, stack, planar = (
        rng.integers(0, 2**16, shape).astype(np.uint16)
        for shape in ((37, 41), (2, 3, 37, 41), (3, 37, 41))
    )
    rgb, rgba = pixels(rng, "uint8", 3), pixels(rng, "uint8", 4)
    alpha = {"photometric": "rgb", "extrasamples": ["assocalpha"]}
    separate = {"photometric": "rgb", "planarconfig": "separate"}
    tiled = {"photometric": "rgb", "tile": (16, 16)}
    kinds = {
        "planar": (planar, separate),
        "pages": (planar, {"photometric": "minisblack", "metadata": None}),
        "imagej": (stack, {"imagej": True, "metadata": {"axes": "ZCYX", "unit": "um"}}),
        "imagejlut": (
            rgb[..., 0],
            {"imagej": True, "colormap": stack[0, :, :1, 0] + np.zeros((3, 256), "u2")},
        ),
        "ome": (stack, {"ome": True, "metadata": {"axes": "ZCYX"}}),
        "white": (gray, {"photometric": "miniswhite"}),
        "straight": (rgba, alpha | {"extrasamples": ["unassalpha"]}),
        "premultiplied": (rgba, alpha),
        "cmyk": (rgba, {"photometric": "separated"}),
        "zstd": (rgb, tiled | {"compression": "zstd"}),
        "lzma": (rgb, tiled | {"compression": "lzma"}),
        "jpeg": (rgb, tiled | {"compression": "jpeg"}),
        "predictor": (gray, {"compression": "lzw", "predictor": True}),
        "bits4": (gray.astype("u1") % 16, {"bitspersample": 4}),
        "half": (pixels(rng, "float16", 1), {}),
        "palette": (
            rgb[..., 0],
            {"photometric": "palette", "colormap": np.zeros((3, 256), "u2")},
        ),
    }
    made = [
        (f"{k}.tif", written(tifffile.imwrite, x, **a)) for k, (x, a) in kinds.items()
    ]
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(rgb[::2, ::2], photometric="rgb", subfiletype=1)
        file.write(rgb, photometric="rgb", subifds=1)
        file.write(rgb[::2, ::2], photometric="rgb", subfiletype=1)
    return [*made, ("pyramid.tif", buffer.getvalue())]


def odd_pictures(rng, bombs):
    """Yield names and contents of image files."""
    kinds = {"png": ("uint8", "uint16"), "jpg": ("uint8",)}
    kinds["tif"] = ("uint8", "uint16", "float32")
    whole = [
        (f"{d}x{c}.{s}", cv2.imencode(f".{s}", pixels(rng, d, c))[1].tobytes())
        for s, dtypes in kinds.items()
        for d, c in itertools.product(dtypes, (1, 3) if s == "jpg" else (1, 3, 4))
    ]
    yield from damaged(rng, [*whole, *tiffs(rng)])
    rgb = Image.fromarray(pixels(rng, "uint8", 3))
    for mode, suffix in itertools.product(
        ("P", "1", "L", "LA", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F", "LAB"),
        ("png", "jpeg", "tiff", "gif", "bmp", "webp"),
    ):
        try:
            data = written(rgb.convert(mode).save, suffix)
        except (OSError, ValueError, KeyError):
            continue  # no such file
        yield f"{mode.replace(';', '')}-in-{suffix}.png", data
    for dtype in (
        "int8",
        "int16",
        "uint32",
        "int64",
        "float16",
        "float64",
        "complex64",
    ):
        data = np.ones((40, 40), dtype)
        yield f"{dtype}.tif", written(tifffile.imwrite, data)
    for channels in (2, 5):
        data = pixels(rng, "uint8", channels)
        yield f"x{channels}.tif", written(tifffile.imwrite, data, planarconfig="contig")
    for n in (2, 300):
        data = np.zeros((n, 40, 40), np.uint8)
        yield f"pages{n}.tif", written(tifffile.imwrite, data, photometric="minisblack")
    yield "loop.tif", tiff(40, 40, loop=True)
    for channels, value in itertools.product(
        (1, 3, 4), (np.nan, np.inf, -np.inf, -0.5, -3, 255, 1e38)
    ):
        data = pixels(rng, "float32", channels)
        data[3, 4] = data[3, 4] * 0 + value if channels < 4 else [0, 0, 0, value]
        yield f"{value}x{channels}.tif", cv2.imencode(".tif", data)[1].tobytes()
    yield "1e300.tif", cv2.imencode(".tif", np.full((40, 40), 1e300))[1].tobytes()
    for size, s in itertools.product(((1, 1), (1, 99), (99, 1), (31, 32)), kinds):
        data = cv2.imencode(f".{s}", pixels(rng, "uint8", 3, *size))[1].tobytes()
        yield f"{size[0]}x{size[1]}.{s}", data
    for depth, colour in itertools.product((1, 2, 4, 8, 16, 7), (0, 2, 3, 4, 6, 5)):
        yield f"{depth}-{colour}.png", png(40, 40, depth, colour, zeros(14000))
    endless = b"acTL" + struct.pack(">II", 2**31 - 1, 0)
    yield "frames.png", png(40, 40, 8, 0, zeros(1640), endless)
    jpeg = dict(whole)["uint8x3.jpg"]
    at = jpeg.index(b"\xff\xc0") + 5
    for width, height in HUGE:
        side = f"{width}x{height}"
        yield f"{side}-a.png", png(width, height, 8, 0, zeros(100))
        yield f"{side}-b.png", png(width, height, 16, 6, zeros(100))
        yield f"{side}-a.tif", tiff(width, height)
        yield f"{side}-b.tif", tiff(width, height, 32, 3, 3, zeros(10000))
        size = struct.pack(">HH", min(height, 65535), min(width, 65535))
        yield f"{side}.jpg", jpeg[:at] + size + jpeg[at + 4 :]
    yield "samples.tif", tiff(40, 40, 8, 65535)
    for side in bombs * (5792, 8190, 11585):  # up to 2**25, 2**26 and 2**27 pixels
        for colour, bytes_ in ((0, 1), (2, 3), (6, 8)):
            data = zeros(side * (side * bytes_ + 1))
            depth = 16 if colour == 6 else 8
            yield f"bomb{side}-{colour}.png", png(side, side, depth, colour, data)
        data = jpeg[:at] + struct.pack(">HH", side, side) + jpeg[at + 4 :]
        yield f"bomb{side}.jpg", data
        for bits in (8, 64):
            data = zeros(side * side * bits // 8)
            yield (
                f"bomb{side}-{bits}.tif",
                tiff(side, side, bits, 1, 3 if bits > 8 else 1, data),
            )
    for name, data in (
        ("empty", b""),
        ("text", b"no image\n" * 99),
        ("head", jpeg[:2]),
    ):
        for suffix in ("png", "jpg", "tif"):
            yield f"{name}.{suffix}", data
    for (name, data), suffix in zip(whole, itertools.cycle(("jpg", "tif", "png"))):
        yield f"named-{name.replace('.', '-')}.{suffix}", data


def psfs(rng, marker):
    """Yield names and contents of PSF files."""
    good, eye = rng.random((5, 7)), np.eye(3)
    whole = [
        ("v4.mat", written(scipy.io.savemat, {"kernel": good}, format="4")),
        ("v5.mat", written(scipy.io.savemat, {"kernel": good})),
        ("v5z.mat", written(scipy.io.savemat, {"kernel": good}, do_compression=True)),
        ("f8.npy", written(np.save, good)),
        ("u1.npy", written(np.save, pixels(rng, "uint8", 1))),
        ("psf.png", cv2.imencode(".png", pixels(rng, "uint8", 3, 9, 9))[1].tobytes()),
    ]
    yield from damaged(rng, whole)
    arrays = {
        "complex": eye + 1j,
        "3d": rng.random((3, 3, 3)),
        "scalar": 1.0,
        "0": eye * 0,
    }
    arrays |= {"nan": eye + np.nan, "inf": eye + np.inf, "big": eye * 1.7e308}
    arrays |= {"tiny": eye * 5e-324, "cancel": np.array([[1e300, -1e300], [1e-10, 0]])}
    arrays |= {"minus": -eye, "bool": eye > 0, "int8": eye.astype("i1"), "row": eye[:1]}
    arrays |= {"none": eye[:0], "chars": np.array([["1", "2"]]), "line": eye[0]}
    objects = np.array([[1, Bomb(marker)]], object)
    for name, array in arrays.items():
        yield f"{name}.mat", written(scipy.io.savemat, {"kernel": array})
        yield f"{name}.npy", written(np.save, array)
    others = {"cells": {"kernel": np.array([[1, "a"]], object)}, "void": {}}
    others |= {"struct": {"kernel": {"a": eye}}, "two": {"a": eye, "b": good}}
    others |= {"sparse": {"kernel": scipy.sparse.csc_matrix(eye)}}
    others |= {"only": {"a": good, "text": "b"}, "named": {"a": eye, "kernel": good}}
    for name, contents in others.items():
        yield f"{name}.mat", written(scipy.io.savemat, contents)
    yield "v73.mat", b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + b"\x89HDF" * 99
    yield "object.npy", written(np.save, objects)
    yield "pickle.npy", objects.dumps()
    yield "zip.npy", written(np.savez, objects, eye)
    yield "record.npy", written(np.save, np.zeros((3, 3), "f8,i4"))
    yield "date.npy", written(np.save, np.ones((3, 3), "M8[s]"))
    for order in (">f8", "f2", "g"):
        yield f"order-{order[-2:]}.npy", written(np.save, good.astype(order))
    for rows, columns in (*HUGE, (-1, 5), (5000, 5000)):
        side = f"{rows}x{columns}"
        head = {"descr": "<f8", "fortran_order": False, "shape": (rows, columns)}
        yield f"{side}.npy", written(np.lib.format.write_array_header_1_0, head)
        for packed in (0, 100):
            data = mat(
                rows, columns, min(rows * columns * 8 % 2**33, 2**32 - 1), packed
            )
            yield f"{side}-{packed}.mat", data
        yield f"{side}-4.mat", struct.pack("<5i2s", 0, rows, columns, 0, 2, b"k")
    for name, data in (("empty", b""), ("text", b"no PSF\n" * 99)):
        for suffix in ("mat", "npy", "png"):
            yield f"{name}.{suffix}", data


def make(folder, seed=0, bombs=True):
    """Make files one by one, images and then PSFs; bombs: large once unpacked, too."""
    rng, folder = np.random.default_rng(seed), Path(folder)
    files = {
        "picture": odd_pictures(rng, bombs),
        "psf": psfs(rng, folder / "unpickled"),
    }
    for kind, contents in files.items():
        (folder / kind).mkdir()
        for name, data in contents:
            path = folder / kind / name
            assert not path.exists(), path
            path.write_bytes(data)
            yield path


def judge(path):
    """Read a file; say "usable", "refused", or what is wrong with what came."""
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if path.parent.name == "psf":
                array = pictures.read_psf(path)
                fits = (
                    array.ndim == 2 and abs(array.sum() - 1) < 1e-6
                )  # so it is finite
            else:
                for plane in utils.planes(path)[:3]:
                    array = pictures.read_picture(plane).image
                    fits = array.shape[0] in (1, 3) and min(array.shape[1:]) >= 32
        fits = fits and not warned
        return (
            "usable" if fits else f"{array.shape}, {[str(w.message) for w in warned]}"
        )
    except utils.InputError as error:
        told = str(error)
        return "refused" if str(path) in told and "\n" not in told else f"says: {told}"
    except Exception as error:  # noqa: BLE001 - what is looked for
        return f"{type(error).__name__}: {error}"


def serve(pipe):
    """Judge the files that come, in a child process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send("ready")
    while True:
        verdict = judge(pipe.recv())
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        pipe.send(verdict if grown < GIB else f"takes {grown / GIB:.1f} GiB")


def verdicts(paths):
    """Judge files in a child process, in a fresh one after a failure."""
    context, process = multiprocessing.get_context("spawn"), None
    for path in paths:
        if process is None:
            pipe, far = context.Pipe()
            process = context.Process(target=serve, args=(far,), daemon=True)
            process.start()
            far.close()
            pipe.recv()
        pipe.send(path)
        try:
            verdict = pipe.recv() if pipe.poll(SECONDS) else f"takes over {SECONDS} s"
        except EOFError:
            verdict = "crashes"
        if verdict not in ("usable", "refused"):
            process.kill()
            process = None
        yield path, verdict
    if process:
        process.kill()


def main():
    """Print what went wrong and a table of counts; return the exit status."""
    counts = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        for path, verdict in verdicts(make(folder)):
            good = verdict in ("usable", "refused")
            if not good:
                print(f"{path.parent.name}/{path.name}: {verdict}")
            for kind in (path.parent.name, "all"):
                counts[kind].update(["made", verdict if good else "failed"])
        if Path(folder, "unpickled").exists():
            print("a pickle was run")
            counts["all"]["failed"] += 1
    columns = ("made", "usable", "refused", "failed")
    print(("{:8}" * 5).format("", *columns))
    for kind in ("picture", "psf", "all"):
        print(("{:8}" * 5).format(kind, *(counts[kind][c] for c in columns)))
    return int(counts["all"]["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
