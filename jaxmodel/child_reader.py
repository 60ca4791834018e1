"""The child process that reads files which could crash a library or keep it busy for ever.

`jaxmodel.child` starts it. Each function reads a file as the project does. It imports nothing of
the project, so that it starts at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def tokenizer(path: str, texts: Sequence[str]) -> None:
    """Read a tokenizer.json, and encode some texts with it."""
    import tokenizers

    made = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    made.no_padding()
    made.no_truncation()
    try:
        rows = [row.ids for row in made.encode_batch_fast(list(texts), add_special_tokens=True)]
        made.decode_batch([row[:1000] for row in rows])
    except Exception:
        # a refused text is not a fault of the file; a panic of Rust is no Exception
        return


def records(path: str) -> None:
    """Read all records of an ArrayRecord file, and compare two ways of counting them."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path)
    count = reader.num_records()
    for start in range(0, count, 64):
        reader.read(start, min(start + 64, count))
    reader.close()


def table(path: str, field: str | None) -> None:
    """Read a column of a Parquet file."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    for rows in file.iter_batches(columns=None if field is None else [field], batch_size=64):
        rows.validate(full=True)


def serve(memory: int) -> None:
    """Answer questions until there are no more.

    An answer says what is wrong: an empty text for nothing, None for lack of memory.
    """
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError, OSError):
        pass  # not on this system
    known = {"tokenizer": tokenizer, "records": records, "table": table}
    for line in sys.stdin:
        kind, path, more = json.loads(line)
        said: str | None = ""
        try:
            known[kind](path, **more)
        except MemoryError:
            said = None
        except BaseException as error:  # a panic of Rust is no Exception
            said = str(error) or type(error).__name__
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
