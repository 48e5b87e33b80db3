"""Sound for models: WAV files as 16 kHz mono, and Whisper's log-mel spectrogram."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import cache
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE = 16_000
WINDOW = 30 * RATE
"""How many samples the model hears at a time."""
FFT, HOP, MELS = 400, 160, 80
RATES = 1_000, 768_000
"""The lowest and the highest rate that is converted: the filter grows with what the rates do not share."""


def read_wav(path: str | PathLike[str]) -> NDArray[np.float32]:
    """A WAV file as mono at 16 kHz, from -1 to 1.

    PCM of 8, 16, 24 or 32 bits and floats, any number of channels, which are averaged.

    Raises
    ------
    OSError, ValueError
        For a file that is missing, is no such WAV, or holds no sound; the message names it.

    Examples
    --------
    >>> from nbattn.models.audio import read_wav
    >>> read_wav("no/such.wav")
    Traceback (most recent call last):
        ...
    FileNotFoundError: cannot read the sound file no/such.wav: No such file or directory
    """
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            # Chunks of other programs, and sound that ends before its chunk.
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            rate, data = wavfile.read(file)
    except OSError as error:
        msg = f"cannot read the sound file {path}: {error.strerror or error}"
        raise type(error)(msg) from error
    # A damaged head fails in struct, NumPy or scipy itself, in a dozen ways.
    except Exception as error:
        msg = f"{path} is no WAV file of PCM or floats ({error})"
        raise ValueError(msg) from error
    if not data.size:
        msg = f"{path} holds no sound: it has no samples"
        raise ValueError(msg)
    if not RATES[0] <= rate <= RATES[1]:
        msg = f"{path} has {rate} samples a second; expected {RATES[0]} to {RATES[1]}"
        raise ValueError(msg)
    mono = _mono(data)
    if not np.isfinite(mono).all():
        msg = f"{path} holds NaN or inf"
        raise ValueError(msg)
    shared = math.gcd(RATE, rate)
    if rate != RATE:
        mono = resample_poly(mono, RATE // shared, rate // shared)
    return mono


def _mono(data: NDArray[Any]) -> NDArray[np.float32]:
    """The mean of the channels ``(samples, channels)`` or ``(samples,)``, from -1 to 1."""
    channels = data.T if data.ndim == 2 else data[None]
    # 24 bits come in the upper ones of 32, and 8 bits are the only ones without a sign.
    half = 1.0 if data.dtype.kind == "f" else 2.0 ** (8 * data.dtype.itemsize - 1)
    middle = np.float32(half if data.dtype.kind == "u" else 0)
    mono = np.zeros(len(data), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for channel in channels:  # one at a time: an hour of sound is hundreds of megabytes
            mono += (channel.astype(np.float32) - middle) / np.float32(half * len(channels))
    return mono


def windows(sound: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Pieces of at most 30 s with where they begin, cut where the last 5 s before that are quietest.

    A word that a cut goes through is lost to both sides, so that no fixed step is taken.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models.audio import windows
    >>> sound = np.ones(40 * 16_000, np.float32)
    >>> sound[27 * 16_000 : 28 * 16_000] = 0
    >>> [(start / 16_000, len(piece) / 16_000) for start, piece in windows(sound)]
    [(0.0, 27.1), (27.1, 12.9)]
    """
    begin, step = 0, RATE // 5
    while len(sound) - begin > WINDOW:
        tail = sound[begin + WINDOW - 5 * RATE : begin + WINDOW].astype(np.float64).reshape(-1, step)
        quietest = int(np.argmin((tail * tail).sum(axis=1)))
        end = begin + WINDOW - 5 * RATE + quietest * step + step // 2
        yield begin, sound[begin:end]
        begin = end
    yield begin, sound[begin:]


def log_mel(sound: NDArray[np.float32]) -> NDArray[np.float32]:
    """Whisper's picture of up to 30 s of sound: ``(80, 3000)``, the power of 80 bands each 10 ms.

    The rest of the 30 s is silence. The logarithm is cut off 8 powers of ten below the loudest.

    References
    ----------
    Radford et al., 2022, https://arxiv.org/abs/2212.04356, and its code.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models.audio import log_mel
    >>> tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    >>> log_mel(tone).shape, int(log_mel(tone)[:, 50].argmax())
    ((80, 3000), 26)
    """
    if sound.ndim != 1 or len(sound) > WINDOW:
        msg = f"sound has shape {sound.shape}; expected one dimension of at most {WINDOW} samples"
        raise ValueError(msg)
    padded = np.pad(np.pad(sound.astype(np.float64), (0, WINDOW - len(sound))), FFT // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT)[:WINDOW:HOP][: WINDOW // HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT) / FFT)
    spectrum = np.fft.rfft(frames * hann)
    power = spectrum.real**2 + spectrum.imag**2
    log = np.log10(np.maximum(mel_filters() @ power.T, 1e-10))
    return ((np.maximum(log, log.max() - 8) + 4) / 4).astype(np.float32)


@cache
def mel_filters() -> NDArray[np.float64]:
    """Slaney's 80 triangles over the 201 frequencies, up to 8 kHz, each of the area 1: ``(80, 201)``.

    The mel scale is linear up to 1000 Hz, which is 15, and logarithmic above it.
    """
    steps = math.log(6.4) / 27
    top = 15 + math.log(RATE / 2 / 1000) / steps
    mels = np.linspace(0, top, MELS + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(steps * (mels - 15)))
    frequencies = np.linspace(0, RATE / 2, FFT // 2 + 1)
    low, middle, high = (edges[i : i + MELS, None] for i in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
