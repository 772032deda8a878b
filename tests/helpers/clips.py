"""Change the boxes of mp4 files as cameras and broken muxers do."""

import struct


def atom(data, name):
    """Return where the content of the first atom ``name`` of an mp4 file begins."""
    return data.index(name.encode()) + 4


def rotate(path, degrees):
    """Give a clip a display matrix that turns it counterclockwise by 90, 180 or 270 degrees."""
    one = 1 << 16
    # Row by row: a, b, u, c, d, v, x, y, w of the track header.
    a, b = {90: (0, -one), 180: (-one, 0), 270: (0, one)}[degrees]
    matrix = struct.pack(">9i", a, b, 0, -b, a, 0, 0, 0, 1 << 30)
    data = bytearray(path.read_bytes())
    start = atom(data, "tkhd") + 40
    data[start : start + 36] = matrix
    path.write_bytes(data)


def claim_hours(path, hours):
    """Write a duration into the headers of an mp4 or webm file; its frames stay."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".webm":  # element 0x4489, a double of milliseconds
        struct.pack_into(">d", data, data.index(b"\x44\x89\x88") + 3, hours * 3.6e6)
    else:
        for name, ticks in (("mvhd", 12), ("mdhd", 12)):
            start = atom(data, name)
            (scale,) = struct.unpack_from(">I", data, start + ticks)
            struct.pack_into(">I", data, start + 16, scale * 3600 * hours)
    path.write_bytes(data)


def hide_start(path, frames, fps=16):
    """Let an mp4 file begin ``frames`` later by its edit list; the packets before stay in it."""
    data = bytearray(path.read_bytes())
    (scale,) = struct.unpack_from(">I", data, atom(data, "mdhd") + 12)
    place = atom(data, "elst") + 12
    (time,) = struct.unpack_from(">i", data, place)
    struct.pack_into(">i", data, place, time + frames * scale // fps)
    path.write_bytes(data)
