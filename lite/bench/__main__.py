"""The command line: `python -m lite.bench ARTIFACT...` and `python -m lite.bench record ARTIFACT --data … --out R`.

Tables go to stdout and everything else to stderr. Exit status: 0 all went well, 1 an artifact or a study failed (each
is one line on stderr), 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import lite
from lite._version import __version__
from lite.artifact.open import load_artifact
from lite.bench.measure import Options
from lite.bench.quality import Clinical
from lite.bench.results import Bench, FailedRow
from lite.cli.options import ENGINES, add_engine, add_image_folder, add_memory
from lite.console import EXIT_FAILED, positive, run_command, say, short_names, show_progress
from lite.errors import LiteError
from lite.files import check_writable
from lite.studies.readers import check_films, read_studies
from lite.studies.study import Study

if TYPE_CHECKING:
    from lite.bench.run import Job


_ROOT: Final = Path(lite.__file__).resolve().parent.parent
_DEMO_ARTIFACTS: Final = (Path("build/demo/artifact-fp16"), Path("build/demo/artifact"))  # of where one is
_DEMO_STUDIES: Final = _ROOT / "benchmarks" / "references" / "phantom" / "studies.json"
_DEMO_RECORD: Final = _ROOT / "benchmarks" / "references" / "phantom_fp16.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    record = given[:1] == ["record"]
    arguments = _record_parser().parse_args(given[1:]) if record else _parser().parse_args(given)
    return run_command(lambda: _record(arguments) if record else _bench(arguments, given))


# -- Arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lite.bench",
        description="Measure exported artifacts: latency, memory and quality in one table. Each runs in a process of "
        "its own, one study at a time and in batches. A research tool: not for clinical use.",
        epilog="python -m lite.bench record ARTIFACT --data LIST.json --out R keeps what the fp16 model does on a list "
        "of studies; with --reference R any other artifact is compared with that, on machines where fp16 does not "
        "fit.\n\nexit status: 0 done, 1 an artifact or a study failed, 2 wrong use, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llava-rad-lite {__version__}")
    parser.add_argument(
        "artifacts", type=Path, nargs="*", metavar="ARTIFACT", help="folders written by python -m export (default: the "
        "demo's, as make demo leaves them)",
    )  # fmt: skip
    _add_data(parser)
    parser.add_argument(
        "--reference", type=Path, metavar="RECORD", help="a reference record of the same studies, to lose nothing "
        "against (default: the demo's, for the demo)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-sizes", type=_batch_sizes, default=Options().batch_sizes, metavar="N,N", help="studies at a time, for "
        "the throughput (default: 1,4)",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=positive, default=Options().min_runs, metavar="N", help="time at least so many studies one by "
        "one, some of them again if there are fewer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="stop each text after N tokens (default: the artifact's)"
    )
    add_engine(parser, engines=(*ENGINES, "both"))
    add_memory(parser)
    parser.add_argument(
        "--radgraph", action="store_true", help="also F1-RadGraph, for real reports, with the extra "
        "clinical; its package fetches its weights when they are not there yet, and sends nothing",
    )  # fmt: skip
    parser.add_argument(
        "--chexbert", type=Path, metavar="FILE", help="also CheXbert F1, with your own chexbert.pth and the vocab.txt "
        "of bert-base-uncased beside it",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a report with plots, films and texts")
    return parser


def _record_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lite.bench record",
        description="Keep what a model does on a list of studies: tokens, probabilities, texts, times. Run it once "
        "where fp16 fits; python -m lite.bench --reference compares any other artifact with it.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="a folder written by python -m export: fp16")
    _add_data(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="R", help="writes R.json and R.safetensors")
    parser.add_argument(
        "--check", type=Path, metavar="CANDIDATE", help="then measure on this artifact by how much a KL from the "
        "record is too low, and print it",
    )  # fmt: skip
    add_engine(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, metavar="LIST.json", help="studies in LLaVA-Rad's evaluation format (default: the demo's "
        "films; their reports say nothing of another model)",
    )  # fmt: skip
    add_image_folder(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N studies")


def _batch_sizes(text: str) -> tuple[int, ...]:
    return tuple(positive(part.strip()) for part in text.split(","))


# -- Commands --------------------------------------------------------------------------------------------------------


def _bench(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    from lite.bench.roofline import modelled_tables
    from lite.bench.run import run_bench
    from lite.bench.table import format_tables, write_json

    job = _job(arguments, shlex.join(["python", "-m", "lite.bench", *given]))
    _check_outputs(arguments)
    bench = run_bench(job, show_progress)
    modelled = modelled_tables(bench)
    sys.stdout.write(f"{format_tables(bench, modelled)}\n")
    if arguments.json is not None:
        write_json(bench, modelled, arguments.json)
        say(f"figures: {arguments.json}")
    if arguments.html is not None:
        from lite.bench.report import write_report

        write_report(bench, arguments.html, modelled=modelled)
        say(f"report: {arguments.html}")
    return _report_failures(bench)


def _job(arguments: argparse.Namespace, command: str) -> Job:
    from lite.bench.run import Job

    paths = _artifacts(arguments)
    studies, data = _studies(arguments)
    is_demo = arguments.data is None and _is_demo(paths)
    record = _reference(arguments, is_demo=is_demo)
    if record is not None and arguments.limit is None:
        studies = _recorded_studies(record, studies)
    if arguments.chexbert is not None:
        from lite.eval.chexbert import check_chexbert_files

        check_chexbert_files(arguments.chexbert)
    return Job(
        artifacts=tuple(zip(short_names(paths), paths, strict=True)),
        studies=tuple(studies),
        data=data,
        record=record,
        options=Options(
            engine=arguments.engine,
            device=arguments.device,
            dtype=arguments.dtype,
            provider=arguments.provider,
            cache_dtype=arguments.cache_dtype,
            batch_sizes=arguments.batch_sizes,
            min_runs=arguments.runs,
            max_new_tokens=arguments.max_new_tokens,
            memory_limit=arguments.memory_limit,
        ),
        clinical=Clinical(radgraph=arguments.radgraph, chexbert=arguments.chexbert, device=arguments.device),
        command=command,
        reports_apply=arguments.data is not None or is_demo,
    )


def _artifacts(arguments: argparse.Namespace) -> list[Path]:
    """Return the folders to measure; what is no artifact is found before anything is measured."""
    paths: list[Path] = arguments.artifacts
    if not paths:
        paths = [path for path in _DEMO_ARTIFACTS if path.is_dir()]
        if not paths:
            msg = (
                f"got no artifact, and no demo in {_DEMO_ARTIFACTS[0].parent} · expected one of them · name one "
                "written by python -m export, or run make demo in a checkout"
            )
            raise LiteError(msg)
        say(f"no artifact named: taking the demo's, {' and '.join(map(str, paths))}")
    for path in paths:
        load_artifact(path)
    return paths


def _reference(arguments: argparse.Namespace, *, is_demo: bool) -> Path | None:
    record: Path | None = arguments.reference
    if record is not None and arguments.max_new_tokens is not None:
        msg = (
            f"got --max-new-tokens {arguments.max_new_tokens} and a --reference · expected one of them: texts that are "
            "cut cannot be those of the reference · leave one out"
        )
        raise LiteError(msg)
    whole = arguments.limit is None and arguments.max_new_tokens is None
    if is_demo and record is None and whole and _DEMO_RECORD.is_file():
        record = _DEMO_RECORD
        say(f"reference: {record}")
    return record


def _recorded_studies(record: Path, studies: Sequence[Study]) -> Sequence[Study]:
    """Take as many studies as the record was made of, where the list begins with those."""
    from lite.eval.record import studies_of
    from lite.eval.record_file import read_record

    recorded = studies_of(read_record(record), studies)
    if len(recorded) < len(studies):
        say(f"the record is of the first {len(recorded)} of {len(studies)} studies: taking those")
    return recorded


def _studies(arguments: argparse.Namespace) -> tuple[Sequence[Study], str]:
    path: Path | None = arguments.data
    if path is None:
        if not _DEMO_STUDIES.is_file():
            msg = (
                "got no --data, and not the repository with the demo's films · expected studies to measure on · name "
                "a JSON list in LLaVA-Rad's evaluation format with --data"
            )
            raise LiteError(msg)
        say(f"no --data: taking the demo's films, {_DEMO_STUDIES.parent}")
        path = _DEMO_STUDIES
    listed = read_studies(path, image_folder=arguments.image_folder)
    if listed.remark:
        say(f"note: {listed.remark}")
    studies = listed[: arguments.limit]
    check_films(studies, path, every=False)
    return studies, str(path)


def _is_demo(paths: Sequence[Path]) -> bool:
    """Say whether all artifacts are of the model that the demo's films and record are for."""
    if not _DEMO_RECORD.is_file():
        return False
    model = json.loads(_DEMO_RECORD.read_text(encoding="utf-8"))["record"]["model"]
    return all(load_artifact(path).manifest.model == model for path in paths)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Find out before an hour of measuring that a file cannot be written, or not be made."""
    check_writable(arguments.json, arguments.html)
    if arguments.html is not None:
        from lite.bench.report import check_packages

        check_packages()


def _report_failures(bench: Bench) -> int:
    status = 0
    for row in bench.rows:
        if isinstance(row, FailedRow):
            say(f"error: {row.name}: {row.error}")
            status = EXIT_FAILED
        elif row.num_skipped:
            for draft in row.drafts:
                if draft.error is not None:
                    say(f"skipped by {row.name}: {draft.error}")
            status = EXIT_FAILED
    return status


def _record(arguments: argparse.Namespace) -> int:
    from lite.bench.machine import machine, versions
    from lite.bench.recording import bound_error, take_record
    from lite.eval.record_file import check_new, record_paths, write_record

    check_new(arguments.out)
    studies, data = _studies(arguments)
    settings = {"engine": arguments.engine, "device": arguments.device, "dtype": arguments.dtype}
    model = lite.load(arguments.artifact, **settings)
    record = take_record(
        model,
        studies,
        name=Path(data).name,
        machine=machine(),
        versions=versions(),
        on_progress=lambda done: show_progress("recording", done, len(studies)),
    )
    written = write_record(record, arguments.out)
    sys.stdout.write(f"{written}: {record.describe()}\n{record.describe_tail()}\n")
    if arguments.check is not None:
        candidate = lite.load(arguments.check, **settings)
        sys.stdout.write(f"{bound_error(record, model, candidate, studies).describe()}\n")
    bytes_written = sum(path.stat().st_size for path in record_paths(arguments.out))
    sys.stdout.write(f"{bytes_written:,} bytes. Next: python -m lite.bench ARTIFACT --reference {arguments.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
