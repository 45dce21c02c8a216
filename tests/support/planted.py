"""Pictures with detail at every scale, as photos have it, and the copies of them that people make."""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

KINDS = ("half the size", "cropped to 90 %", "mirrored", "brightened", "compressed")


def picture(seed: int, side: int = 224) -> Image.Image:
    """Noise whose amplitude falls with its frequency (pink noise), the spectrum of natural pictures (Field 1987)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    channels = []
    for _channel in range(3):
        spectrum = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency
        spectrum[0, 0] = 0
        channel = np.fft.irfft2(spectrum, s=(side, side))
        channels.append(128 + 40 * channel / channel.std())
    return Image.fromarray(np.clip(np.stack(channels, axis=2), 0, 255).astype(np.uint8))


def copy(original: Image.Image, kind: str) -> Image.Image:
    """The same picture, changed as `kind`, one of `KINDS` or ``cropped to 70 %``, says."""
    width, height = original.size
    if kind == "half the size":
        return original.resize((width // 2, height // 2), Image.Resampling.LANCZOS)
    if kind.startswith("cropped"):
        share = int(kind.split()[2]) / 100
        left, top = round(0.6 * width * (1 - share)), round(0.3 * height * (1 - share))
        return original.crop((left, top, left + round(share * width), top + round(share * height)))
    if kind == "mirrored":
        return ImageOps.mirror(original)
    if kind == "brightened":
        return ImageEnhance.Brightness(original).enhance(1.3)
    assert kind == "compressed"
    return original.quantize(24).convert("RGB")


def pixels(image: Image.Image, side: int = 224) -> np.ndarray:
    """``uint8 (side, side, 3)``."""
    return np.array(image.resize((side, side), Image.Resampling.BICUBIC))
