"""The command line: ``nbattn`` and the name of a command, each of which is a function here."""

from __future__ import annotations

import argparse
import codecs
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from . import __version__
from .models import MODELS
from .problem import CACHE_DTYPES

CACHES = ("float32", "bfloat16", "int8", "int4")
"""What a model whose numbers are float32 may keep its keys and values in."""
WEIGHTS = ("float32", "bfloat16", "int8")
"""And its weights."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
"""What the name of a picture may end in."""
# What a shell reports for a program that a signal ended: 128 + SIGINT, 128 + SIGPIPE.
INTERRUPTED, PIPE_CLOSED = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; ``sys.argv[1:]`` unless given.

    Returns
    -------
    int
        The exit code: 0, or 2 after one sentence on stderr, 130 after Ctrl-C, 141 where the reader of the
        output has gone.

    Examples
    --------
    >>> from nbattn.__main__ import main
    >>> main(["generate", ""])
    2
    """
    try:
        args = _parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _discard_unwritten()
        return PIPE_CLOSED
    except (ImportError, MemoryError, OSError, ValueError) as error:
        print(f"nbattn: error: {_line(str(error))}", file=sys.stderr)
        _discard_unwritten()
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Complains in one sentence, as every other error does."""

    def error(self, message: str) -> NoReturn:
        msg = f"{message}; see {self.prog} --help"
        raise ValueError(msg)


def _parser() -> _Parser:
    parser = _Parser(prog="nbattn", description="Attention inference: NumPy in, NumPy out, Numba inside.")
    parser.add_argument("--version", action="version", version=f"nbattn {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    generate = commands.add_parser("generate", help="continue a text, or answer, by a small trained model")
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt", type=_prompt)
    generate.add_argument("--model", choices=MODELS, default="glassllm-en", help="default: %(default)s")
    generate.add_argument("--max-tokens", type=_count, default=100, metavar="N", help="default: %(default)s")
    cold = "0, the default, takes the likeliest token"
    generate.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help=cold)
    fewest = "draw among the fewest tokens whose probabilities reach P; default: all tokens"
    generate.add_argument("--top-p", type=_top_p, default=1.0, metavar="P", help=fewest)
    generate.add_argument("--seed", type=_count, metavar="S", help="the same seed draws the same text")
    generate.add_argument("--backend", choices=("cpu", "cuda", "reference"), help="default: cpu")
    stored = "what keys and values are kept in; default: %(default)s"
    generate.add_argument("--cache-dtype", choices=CACHES, default="float32", help=stored)
    plain = "continue the prompt as it is, where the model would answer it"
    generate.add_argument("--raw", action="store_true", help=plain)
    kept = "what weights are kept in; default: %(default)s"
    generate.add_argument("--weights-dtype", choices=WEIGHTS, default="float32", help=kept)
    generate.add_argument(
        "--weights", metavar="DIR", help="where the weight files are; default: in their package"
    )

    align = commands.add_parser("align", help="a word in Katakana, and which letters each kana looks at")
    align.set_defaults(run=_align)
    align.add_argument("word", help="an English word")
    align.add_argument("--json", action="store_true", help="every head's weights, as JSON")
    align.add_argument("--plot", type=_picture, metavar="FILE", help="write a picture too, such as align.png")
    align.add_argument("--backend", choices=("cpu", "reference"), help="default: cpu")
    align.add_argument("--weights", metavar="DIR", help="where the weight file is; default: in its package")

    embed = commands.add_parser("embed", help="how alike sentences are in meaning, by MiniLM")
    embed.set_defaults(run=_embed)
    embed.add_argument("sentences", nargs="*", metavar="sentence", help="of at most 512 tokens")
    embed.add_argument("--file", metavar="FILE", help="more of them, one a line, in UTF-8")
    embed.add_argument("--json", action="store_true", help="the vectors too, as JSON")
    embed.add_argument("--backend", choices=("cpu", "reference"), help="default: cpu")
    embed.add_argument("--weights", metavar="DIR", help="where model.safetensors is; default: in its package")

    transcribe = commands.add_parser("transcribe", help="what is said in a WAV file, by Whisper base")
    transcribe.set_defaults(run=_transcribe)
    transcribe.add_argument("file", help="a WAV file of any rate and length")
    transcribe.add_argument("--translate", action="store_true", help="write it in English")
    heard = "of the speech, as en; default: the likeliest of the first 30 s"
    transcribe.add_argument("--language", metavar="CODE", help=heard)
    looked = "write a picture of where in the first 30 s each token looks"
    transcribe.add_argument("--plot", type=_picture, metavar="FILE", help=looked)
    transcribe.add_argument("--backend", choices=("cpu", "reference"), help="default: cpu")
    transcribe.add_argument("--weights", metavar="DIR", help="where model.bin is; default: in its packages")

    look = commands.add_parser("look", help="where a vision transformer looks in a picture")
    look.set_defaults(run=_look)
    look.add_argument("image", help="a picture in any format that Pillow reads")
    look.add_argument(
        "--json", action="store_true", help="the most salient part and every head's attention, as JSON"
    )
    look.add_argument(
        "--plot", type=_picture, metavar="FILE", help="write a picture of both over it, such as look.png"
    )
    look.add_argument("--backend", choices=("cpu", "reference"), help="default: cpu")
    look.add_argument("--weights", metavar="DIR", help="where the weight file is; default: in its package")

    recommend = commands.add_parser("recommend", help="films for a user of MovieLens 100k")
    recommend.set_defaults(run=_recommend)
    recommend.add_argument("user", help="a user's number")
    recommend.add_argument("--json", action="store_true", help="all of it, as JSON")
    attended = "write a picture too, of how much each head looks at each of the last films"
    recommend.add_argument("--plot", type=_picture, metavar="FILE", help=attended)
    recommend.add_argument("--backend", choices=("cpu", "reference"), help="default: cpu")
    trained = "where the trained file is; default: in the user's cache"
    recommend.add_argument("--weights", metavar="DIR", help=trained)

    info = commands.add_parser("info", help="versions, processor, chosen kernels, threads, cache folder, GPU")
    info.set_defaults(run=_info)

    warmup = commands.add_parser("warmup", help="compile every kernel now, so that no first call waits")
    warmup.set_defaults(run=_warmup)
    only = "only for this dtype (of a cache: int8, int4); may be repeated; default: all"
    warmup.add_argument("--dtype", action="append", choices=CACHE_DTYPES, help=only)
    return parser


def _prompt(text: str) -> str:
    if not text:
        msg = "it is empty; give at least one character"
        raise argparse.ArgumentTypeError(msg)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        msg = f"it has {text[error.start]!a}, which is no character; expected UTF-8"
        raise argparse.ArgumentTypeError(msg) from None
    return text


def _picture(text: str) -> str:
    path = Path(text)
    if path.suffix.lower() not in PICTURES or path.is_dir():
        msg = f"got {text!r}; expected a name that ends in {', '.join(PICTURES)}"
        raise argparse.ArgumentTypeError(msg)
    if not path.parent.is_dir():
        msg = f"there is no folder {str(path.parent)!r}"
        raise argparse.ArgumentTypeError(msg)
    return text


def _count(text: str) -> int:
    return int(_number(text, int, lambda n: n >= 0, "a whole number of at least 0"))


def _temperature(text: str) -> float:
    return _number(text, float, lambda t: 0 <= t < math.inf, "a number of at least 0")


def _top_p(text: str) -> float:
    return _number(text, float, lambda p: 0 < p <= 1, "a number above 0 and at most 1")


def _number(text: str, kind: Any, fits: Any, expected: str) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not fits(number):
        msg = f"got {text!r}; expected {expected}"
        raise argparse.ArgumentTypeError(msg)
    return number


def _generate(args: argparse.Namespace) -> None:
    from .models import load

    begin = time.perf_counter()
    model, tokenizer = load(
        args.model,
        folder=args.weights,
        backend=args.backend,
        cache_dtype=args.cache_dtype,
        weights_dtype=args.weights_dtype,
    )
    model([[0]])  # compiles the kernel, so that the speeds below are the model's
    loaded = time.perf_counter()
    raw = args.raw or not tokenizer.chats
    prompt = tokenizer.encode(args.prompt) if raw else tokenizer.prompt(args.prompt)
    tokens = model.generate(
        prompt, args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    )
    if raw:
        _write(args.prompt)
    times: list[float] = []
    for text in tokenizer.stream(_timed(tokens, times)):
        _write(text)
    _write("\n")
    report = [f"loaded in {loaded - begin:.2f} s"]
    if times:
        report.append(f"prompt: {_speed(min(len(prompt), model.config.max_len), times[0] - loaded)}")
    if len(times) > 1:
        report.append(f"generation: {_speed(len(times) - 1, times[-1] - times[0])}")
    print("; ".join(report), file=sys.stderr)


def _timed(tokens: Iterator[int], times: list[float]) -> Iterator[int]:
    """The tokens; the list gets when each of them came."""
    for token in tokens:
        times.append(time.perf_counter())
        yield token


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens in {seconds:.3f} s ({tokens / max(seconds, 1e-9):.0f} tokens/s)"


def _line(text: str) -> str:
    """A complaint as one line, whatever the argument or the file name in it holds, and no endless one."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"


def _write(text: str) -> None:
    """Print a piece of text at once; what the terminal's encoding lacks becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _align(args: argparse.Namespace) -> None:
    from .models import e2k

    alignment = e2k.load(args.weights, args.backend)(args.word)
    if args.plot:
        from .plot import attention_map

        weights, title = alignment.weights.mean(axis=0), alignment.katakana
        attention_map(weights, alignment.kana, alignment.letters, title=title).savefig(args.plot)
    if args.json:
        fields = {"katakana": alignment.katakana, "letters": alignment.letters, "kana": alignment.kana}
        print(json.dumps(fields | {"weights": alignment.weights.astype(float).round(6).tolist()}))
    else:
        _write(f"{alignment.katakana}\n\n{e2k.table(alignment)}\n")


def _embed(args: argparse.Namespace) -> None:
    from .models import minilm

    sentences = [*args.sentences, *(_lines(args.file) if args.file else ())]
    if not sentences:
        msg = "there is no sentence; give at least one, or a --file of them"
        raise ValueError(msg)
    model = minilm.load(args.weights, args.backend)
    batches = list(minilm.batches(model.tokens(sentences)))
    vectors = np.concatenate([model.encode(batch) for batch in _bar(batches, "batch")])
    if args.json:
        # Row by row: of ten thousand sentences all similarities at once would be gigabytes.
        print(json.dumps({"sentences": sentences})[:-1], end="")
        for name, rows in (("embeddings", iter(vectors)), ("similarities", (vectors @ x for x in vectors))):
            for i, row in enumerate(rows):
                print(", " if i else f', "{name}": [', end="")
                print(json.dumps(row.astype(float).round(8).tolist()), end="")
            print("]", end="")
        print("}")
    else:
        for line in minilm.table(sentences, vectors):
            _write(line + "\n")


def _lines(path: str) -> list[str]:
    """The lines of a UTF-8 file, without their ends."""
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        msg = f"cannot read the file {path}: {error.strerror}"
        raise type(error)(msg) from error
    try:
        text = content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        msg = f"{path} is not UTF-8: line {number} has the byte {content[error.start]:#04x}"
        raise ValueError(msg) from None
    return text.removesuffix("\n").split("\n") if text else []


def _recommend(args: argparse.Namespace) -> None:
    from .models import sasrec

    films = sasrec.read_films()
    history = films.history(args.user)
    model = sasrec.load(films, args.weights, args.backend)
    answer = model.recommend(history)
    if args.plot:
        from .plot import attention_map

        weights, titles, heads = sasrec.last_heads(films, answer)
        picture = attention_map(
            weights, titles, heads, title=f"user {args.user}: layer.head", most=weights.max()
        )
        picture.savefig(args.plot)
    if args.json:
        print(json.dumps(sasrec.fields(films, answer) | {"held out": model.metrics}))
    else:
        _write(f"{sasrec.table(films, answer)}\n\n{sasrec.measured(model.metrics)}\n")


def _transcribe(args: argparse.Namespace) -> None:
    from .models import audio, whisper

    pieces = list(audio.windows(audio.read_wav(args.file)))
    model = whisper.load(args.weights, args.backend)
    language, texts = args.language, list[str]()
    for _, sound in _bar(pieces, "window"):
        plot = bool(args.plot) and not texts
        heard = model(sound, language=language, translate=args.translate, return_weights=plot)
        if not heard.tokens:
            continue
        language = heard.language
        texts.append(heard.text)
        if plot:
            from .plot import attention_map

            weights, seconds = whisper.binned(heard, len(sound) / audio.RATE)
            title = f"{Path(args.file).name} ({heard.language}): the seconds that each token looks at"
            picture = attention_map(weights, heard.pieces, seconds, title=title, most=weights[:, :-1].max())
            picture.savefig(args.plot)
    if not texts:
        msg = f"nobody speaks in {args.file}, as far as Whisper base hears"
        raise ValueError(msg)
    _write("".join(texts).strip() + "\n")


def _bar(items: Sequence[Any], unit: str) -> Any:
    """The items, with a progress bar on a terminal if there is tqdm and more than one."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, unit=unit, disable=None if len(items) > 1 else True)


def _look(args: argparse.Namespace) -> None:
    from .models import pictures, vit

    picture = vit.check(pictures.read(args.image))
    look = vit.load(args.weights, args.backend)(picture)
    if args.plot:
        from .plot import overlay

        mean, saliency = look.attention.mean(axis=0), look.saliency
        maps = {"attention of the class token": look.cropped(mean), "saliency": look.cropped(saliency)}
        overlay(picture, maps).savefig(args.plot)
    region = look.most_salient()
    if args.json:
        heads = look.attention[:, *look.patches].astype(float).round(6).tolist()
        print(json.dumps(region._asdict() | {"frame": look.frame._asdict(), "attention": heads}))
        return
    height, width = look.size
    (x, y), (left, top, right, bottom) = region.point, region.box
    scale = ", ".join(f"{shade} {level}" for shade, level in zip(vit.SHADES[1:], vit.LEVELS, strict=True))
    _write(
        f"{width} x {height} pixels; attention of the class token, {scale} times its even share or more:\n\n"
        f"{vit.table(look)}\n\n"
        f"most salient: x {x}, y {y} ({region.saliency:.2f}); box x {left} to {right}, y {top} to {bottom}\n"
    )


def _info(args: argparse.Namespace) -> None:
    from .cpu import runtime

    lines = {"nbattn": __version__, "python": platform.python_version()}
    lines |= {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "numba", "llvmlite")}
    lines |= runtime.describe()
    lines["GPU"] = _gpu()
    width = max(map(len, lines))
    for label, text in lines.items():
        print(f"{label:{width}}  {text}")


def _gpu() -> str:
    from .cuda import compiler, launch

    try:
        model = launch.device(0).model
    except (OSError, RuntimeError):
        return "none"
    missing = "" if compiler.has_packages() else f'; for backend="cuda": {compiler.INSTALL}'
    return f"{model}{missing}"


def _warmup(args: argparse.Namespace) -> None:
    from .cpu import runtime

    names = runtime.kernel_names(args.dtype or CACHE_DTYPES)
    begin = time.perf_counter()
    outcomes = []
    for done, name in enumerate(names):
        _progress(done, len(names), name)
        outcomes.append(runtime.compile_kernel(name))
    _progress(len(names), len(names), "done")
    seconds = time.perf_counter() - begin
    folder = runtime.cache_folder()
    where = f"cache: {folder}" if folder else "no cache folder is writable, so they end with this process"
    compiled, cached = outcomes.count("compiled"), outcomes.count("cached")
    print(f"{compiled} kernels compiled, {cached} already cached, in {seconds:.1f} s; {where}")


def _progress(done: int, total: int, name: str) -> None:
    """One line that is redrawn on a terminal, else one line for each kernel."""
    if sys.stderr.isatty():
        filled = 24 * done // max(total, 1)
        bar = "#" * filled + "-" * (24 - filled)
        end = "\n" if done == total else ""
        print(f"\r\x1b[K[{bar}] {done}/{total} {name}", file=sys.stderr, end=end, flush=True)
    elif done < total:
        print(f"{done + 1}/{total} {name}", file=sys.stderr, flush=True)


def _discard_unwritten() -> None:
    """Send what cannot be written nowhere, so that the interpreter's flush at exit does not fail too."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
