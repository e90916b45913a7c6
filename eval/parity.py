"""Runs every oracle file of a folder against emjax and prints one row per array.

    python eval/parity.py --oracles ../shared/oracles [--only postprocess] [--fast]

Exit code 0 if every row passes and every file has a case, 1 otherwise.
"""

import argparse
import fnmatch
import importlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from checks import Case, Row, table

# Files that describe or rebuild the oracles, and hold no arrays to compare.
SUPPORT = ("README.md", "*.py", "*.pyc", "noise_floor.json")


def folders(oracles: pathlib.Path, only: str | None = None) -> list[pathlib.Path]:
    """The oracle folders, in name order; ``only`` picks one by name."""
    if not oracles.is_dir():
        raise SystemExit(f"{oracles} is not a folder of oracles")
    found = sorted(folder for folder in oracles.iterdir() if folder.is_dir() and not folder.name.startswith(("_", ".")))
    if only is not None:
        names = [folder.name for folder in found]
        if only not in names:
            raise SystemExit(f"{oracles} has no folder {only!r}; it has {', '.join(names)}")
        found = [oracles / only]
    return found


def cases_of(folder: pathlib.Path) -> dict[str, Case]:
    """Pattern -> case, as ``eval/cases/<folder>.py`` lists them; empty if emjax has none for this folder."""
    if not (pathlib.Path(__file__).parent / "cases" / f"{folder.name}.py").is_file():
        return {}
    return importlib.import_module(f"cases.{folder.name}").CASES


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    files = (path for path in folder.iterdir() if path.is_file())
    return sorted(path for path in files if not any(fnmatch.fnmatch(path.name, pattern) for pattern in SUPPORT))


def case_for(path: pathlib.Path) -> Case | None:
    """The first case whose pattern matches the file's name."""
    return next((case for pattern, case in cases_of(path.parent).items() if fnmatch.fnmatch(path.name, pattern)), None)


def run_file(path: pathlib.Path) -> Iterator[Row]:
    """All rows of one file; a file without a case is one failing row, and so is a case that raises."""
    case = case_for(path)
    if case is None:
        yield Row("no case for this file", float("nan"), float("nan"), "a case", False)
        return
    try:
        yield from case.run(path)
    except Exception as error:
        yield Row(f"{type(error).__name__}: {error}"[:160], float("nan"), float("nan"), "no exception", False)
        if os.environ.get("EMJAX_DEBUG"):
            raise


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracles", type=pathlib.Path, required=True)
    parser.add_argument("--only", help="one folder, such as sam2")
    parser.add_argument("--fast", action="store_true", help="leave out the slow files")
    options = parser.parse_args(arguments)
    passed = failed = skipped = 0
    start = time.monotonic()
    for folder in folders(options.oracles, options.only):
        for path in files_of(folder):
            case = case_for(path)
            if options.fast and case is not None and case.slow:
                skipped += 1
                continue
            rows = list(run_file(path))
            table([(f"{folder.name}/{path.name}", row) for row in rows])
            sys.stdout.flush()
            passed += sum(row.ok for row in rows)
            failed += sum(not row.ok for row in rows)
    left_out = f", {skipped} slow files left out" if skipped else ""
    print(f"{passed} arrays passed, {failed} failed{left_out}, {time.monotonic() - start:.0f} s")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
