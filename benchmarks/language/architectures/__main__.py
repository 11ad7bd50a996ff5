"""Pack every architecture of the installed transformers that a tiny model can be made of.

python -m benchmarks.language.architectures                       all (20 minutes), or what is left of them
python -m benchmarks.language.architectures --seconds 200         start no case after 200 s
python -m benchmarks.language.architectures --only vit,llama      these model types, again, with details
python -m benchmarks.language.architectures --retry fail          run those again that failed
python -m benchmarks.language.architectures --report --write      write the page of what there is
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from benchmarks.language.architectures import page
from benchmarks.language.architectures.case import FOLDERS, run_case
from benchmarks.language.architectures.cases import Case, all_cases
from benchmarks.language.architectures.problems import place_of
from benchmarks.language.architectures.results import Results
from benchmarks.language.architectures.time_limit import TimedOut, time_limit
from benchmarks.lib import report
from benchmarks.lib.models import CACHE


def main() -> int:
    """Run what the command line asks for; return 1 if cases fail and no page is written."""
    arguments = parsed()
    results = Results(arguments.out, arguments.fresh)
    if not arguments.report:
        quiet()
        sweep(chosen(arguments, results), results, arguments)
    if arguments.only and not arguments.write:
        return 0
    result = report.Result("architectures", page.TITLE, "python -m benchmarks.language.architectures --write")
    page.write(result, results.records, len(all_cases()))
    if arguments.write:
        result.write()
        return 0
    return int(any(record["status"] == "fail" for record in results.records.values()))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=page.TITLE)
    parser.add_argument("--out", type=Path, default=CACHE / "architectures.json", help="where records are kept")
    parser.add_argument("--only", default="", help="model types, with commas between them; run again, with details")
    parser.add_argument("--task", default="", help="only classes of this task, as CAUSAL_LM")
    parser.add_argument("--retry", default="", help="run cases of this status again: ok, weights, skip or fail")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so long")
    parser.add_argument("--limit", type=float, default=150, help="seconds that one case may take")
    parser.add_argument("--fresh", action="store_true", help="forget the records")
    parser.add_argument("--keep", type=Path, help="keep the folders of the last case here")
    parser.add_argument("--report", action="store_true", help="run nothing, print the page of the records")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/architectures.md")
    return parser.parse_args()


def quiet() -> None:
    """Keep to one core, off the network, and transformers from the screen."""
    torch.set_num_threads(1)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()
    logger = logging.getLogger("transformers")
    logger.handlers[:] = [logging.NullHandler()]
    logger.propagate = False


def chosen(arguments: argparse.Namespace, results: Results) -> list[Case]:
    """Return the cases that are asked for and not done."""
    only = set(filter(None, arguments.only.split(",")))
    cases = [case for case in all_cases() if arguments.task in ("", case.task)]
    if only:
        return [case for case in cases if case.model_type in only]
    return [
        case
        for case in cases
        if (record := results.records.get(case.key)) is None or record["status"] == arguments.retry
    ]


def sweep(cases: list[Case], results: Results, arguments: argparse.Namespace) -> None:
    """Run cases and keep their records."""
    started, written = time.monotonic(), time.monotonic()
    for number, case in enumerate(cases):
        elapsed = time.monotonic() - started
        if elapsed > arguments.seconds:
            break
        record = timed(case, arguments.keep, arguments.limit)
        results.records[case.key] = record
        left = (time.monotonic() - started) / (number + 1) * (len(cases) - number - 1)
        print(f"{number + 1}/{len(cases)}, {left / 60:.0f} min left: {case.key} {record['status']}", flush=True)
        if arguments.only:
            print(json.dumps(record, indent=1)[:4000])
        if time.monotonic() - written > 10:
            results.write()
            written = time.monotonic()
    results.write()


def timed(case: Case, keep: Path | None, limit: float) -> dict[str, Any]:
    """Return the record of a case with the seconds that it took; one that takes too long fails."""
    started = time.monotonic()
    folder = keep or Path(tempfile.mkdtemp(prefix="architectures-"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    try:
        with time_limit(limit):
            record = run_case(case, folder)
    except TimedOut as error:
        record = failed(case, "timeout", str(error), "")
    except Exception as error:  # of the comparisons themselves
        record = failed(case, "benchmark", repr(error), place_of(error))
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    return record | {"seconds": round(time.monotonic() - started, 1)}


def failed(case: Case, kind: str, text: str, place: str) -> dict[str, Any]:
    return {"task": case.task, "status": "fail", "problems": [{"kind": kind, "text": text, "place": place}]}


if __name__ == "__main__":
    sys.exit(main())
