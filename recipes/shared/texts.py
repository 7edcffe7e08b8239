"""Texts to train on: files, folders, a dataset's column, or Python's own documentation."""

import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import datasets

SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".go", ".rs")
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def documents(paths: list[Path], dataset: str | None, column: str, split: str) -> Iterator[str]:
    """The documents of a run, in an order that depends on nothing else.

    Args:
        paths: files, each a document, and folders, of which all text files below count, but for hidden ones.
        dataset: Hub id, a folder that `save_to_disk` wrote, or a file of JSON lines, CSV or Parquet.
        column: of the dataset, with a document in each row.
        split: of the dataset.

    Raises:
        SystemExit: what cannot be read, and both or none of the two where only one would do.
    """
    if paths and dataset:
        raise SystemExit("--text and --dataset: give one of them")
    if dataset:
        return rows_of(dataset, column, split)
    if paths:
        return map(read, [file for path in paths for file in files(path)])
    return iter(pydoc_data.topics.topics.values())


def files(path: Path) -> list[Path]:
    """The text files at or below `path`, sorted."""
    if not path.is_dir():
        return [path]
    below = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
    found = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not found:
        raise SystemExit(f"--text {path}: no text file is in this folder (of {', '.join(SUFFIXES)})")
    return found


def read(file: Path) -> str:
    """The text of a file."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--text {file}: cannot be read as UTF-8 ({error}). Leave it out, or convert it") from None


def rows_of(name: str, column: str, split: str) -> Iterator[str]:
    """The texts in a column of a dataset, row by row; rows without one are empty."""
    path = Path(name)
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        loaded = datasets.load_from_disk(name)
        data = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    elif path.suffix in LOADERS:
        data = datasets.load_dataset(LOADERS[path.suffix], data_files=name, split="train")
    else:
        data = datasets.load_dataset(name, split=split)
    if column not in data.column_names:
        raise SystemExit(f"--column {column}: the dataset {name} has {', '.join(data.column_names)}")
    return (row[column] or "" for row in data.select_columns(column))
