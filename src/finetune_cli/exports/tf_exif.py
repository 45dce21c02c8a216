"""The Exif orientation of a JPEG file as TensorFlow operations: bytes in, a number from 1 to 8 out.

Phones store photos as the sensor saw them and note the orientation in the Exif data; a model that ignores it sees many
of them rotated. Damaged data count as 1, upright, as they do in `photos/decode.py`. Source: Exif 2.32, section 4.5, and
TIFF 6.0, section 2.
"""

from typing import Any

_HEAD = 1 << 18  # the Exif data are at the beginning of a file; only so many bytes are searched
_MOST_TAGS = 256
_ORIENTATION = 0x0112


def orientation(tf: Any, data: Any) -> Any:
    """``int32 ()`` from 1 to 8 for the JPEG file in the string `data`."""
    parts = tf.strings.split(tf.strings.substr(data, 0, _HEAD), b"Exif\0\0")
    block = tf.cond(tf.size(parts) > 1, lambda: parts[1], lambda: tf.constant(b""))
    values = tf.cast(tf.io.decode_raw(tf.strings.join([block, tf.constant(bytes(16))]), tf.uint8), tf.int64)
    order = tf.strings.substr(block, 0, 4)
    big_endian = tf.equal(order, b"MM\0*")
    known = tf.logical_or(big_endian, tf.equal(order, b"II*\0"))

    def numbers(offsets: Any, length: int) -> Any:
        """The unsigned numbers of `length` bytes at `offsets`; bytes outside of the block read as zero."""
        wanted = tf.cast(offsets, tf.int64)[:, tf.newaxis] + tf.range(length, dtype=tf.int64)
        digits = tf.gather(values, tf.minimum(wanted, tf.size(values, tf.int64) - 1))
        digits = tf.cond(big_endian, lambda: digits[:, ::-1], lambda: digits)
        return tf.reduce_sum(digits * tf.constant([256**i for i in range(length)], tf.int64), axis=1)

    directory = numbers([4], 4)
    count = tf.minimum(numbers(directory, 2), _MOST_TAGS)
    entries = directory + 2 + 12 * tf.range(count[0])
    found = tf.boolean_mask(entries, numbers(entries, 2) == _ORIENTATION)
    value = numbers(tf.concat([found, [0]], axis=0)[:1] + 8, 2)[0]
    good = known & (tf.size(found) > 0) & (value >= 1) & (value <= 8)
    return tf.where(good, tf.cast(value, tf.int32), 1)


def upright(tf: Any, photos: Any, number: Any) -> Any:
    """``(n, h, w, c)`` turned as the orientation `number` says."""
    photos = tf.cond(number >= 5, lambda: tf.transpose(photos, (0, 2, 1, 3)), lambda: photos)
    for axis, numbers in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))):
        mirrored = tf.reduce_any(tf.equal(number, numbers))
        photos = tf.cond(mirrored, lambda p=photos, a=axis: tf.reverse(p, [a]), lambda p=photos: p)
    return photos
