"""The texts of the examples, all part of every Python: English documentation and Python source.

Each has a held-out split that is fixed by name, and whose paragraphs (or files) are kept out of the training split.
"""

import sysconfig
import zlib
from pathlib import Path

# Whole topics of `pydoc_data.topics`. They were chosen among those that other topics do not quote.
HELD_OUT_TOPICS = (
    "assert",
    "atom-literals",
    "binary",
    "booleans",
    "calls",
    "global",
    "import",
    "raise",
    "slicings",
    "subscriptions",
    "yield",
)


def english(held_out_topics: tuple[str, ...] = HELD_OUT_TOPICS) -> tuple[bytes, bytes]:
    """The language reference that `help()` shows, as (training text, held-out text).

    Topics quote each other at length ("compound" holds "for", "if", "try" and more). So a paragraph that occurs in the
    held-out topics is removed from the training text, and one that repeats within the training text is kept once;
    without this a held-out split by topic would measure memory.

    A held-out topic that this Python's documentation lacks is passed over.

    Raises:
        ValueError: none of the held-out topics exists.
    """
    from pydoc_data.topics import topics

    held_out_names = [name for name in held_out_topics if name in topics]
    if not held_out_names:
        raise ValueError(f"held_out_topics: expected topics of pydoc_data.topics, got {held_out_topics}")
    held_out = "\n\n".join(topics[name].strip() for name in held_out_names) + "\n"
    seen = {_normalised(paragraph) for paragraph in held_out.split("\n\n")}
    texts = {}
    # Shortest first: a small topic stays whole, and the large one that quotes it loses the quotation.
    for name in sorted(set(topics) - set(held_out_topics), key=lambda name: (len(topics[name]), name)):
        paragraphs = []
        for paragraph in topics[name].strip().split("\n\n"):
            if _normalised(paragraph) not in seen:
                seen.add(_normalised(paragraph))
                paragraphs.append(paragraph)
        texts[name] = "\n\n".join(paragraphs)
    train = "\n\n".join(texts[name] for name in sorted(texts) if texts[name]) + "\n"
    return train.encode(), held_out.encode()


def python_sources() -> tuple[bytes, bytes]:
    """The standard library's top-level modules, as (training text, held-out text), split by file.

    A file is held out if `crc32(name) % 10 == 0`: about a tenth, the same files on every machine with that Python.

    Raises:
        FileNotFoundError: this Python was installed without its sources (some embedded builds carry bytecode only).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    held_out = [file for file in files if zlib.crc32(file.name.encode()) % 10 == 0]
    train = [file for file in files if file not in held_out]
    if not train or not held_out:
        raise FileNotFoundError(f"{folder}: expected the standard library's .py files, found {len(files)}")
    return b"".join(file.read_bytes() for file in train), b"".join(file.read_bytes() for file in held_out)


def package_sources(name: str) -> tuple[bytes, bytes]:
    """A package of the standard library, as (training text, held-out text): every fifth file is held out.

    Raises:
        FileNotFoundError: this Python has no sources of the package.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) / name
    files = sorted(folder.glob("*.py"))
    held_out = files[1::5]
    train = [file for file in files if file not in held_out]
    if not train or not held_out:
        raise FileNotFoundError(f"{folder}: expected a package's .py files, found {len(files)}")
    return b"".join(file.read_bytes() for file in train), b"".join(file.read_bytes() for file in held_out)


def _normalised(paragraph: str) -> str:
    return " ".join(paragraph.split())
