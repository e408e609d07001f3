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
from typing import TYPE_CHECKING

from lite._version import __version__
from lite.artifact.open import load_artifact
from lite.bench.quality import Clinical
from lite.bench.results import FailedRow
from lite.cli.options import ENGINES, add_engine, add_image_folder, add_memory, add_towers, load_model, load_options
from lite.console import EXIT_FAILED, positive, run_command, say, short_names, show_progress
from lite.engines.options import LoadOptions
from lite.errors import LiteError
from lite.files import check_writable, write_whole
from lite.image_tokens import METHODS
from lite.studies.films import check_films
from lite.studies.sources.listed import read_studies
from lite.studies.study import Study

if TYPE_CHECKING:
    from lite.bench.measure import Job
    from lite.bench.results import Bench


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["record"]:
        recorded = _record_parser().parse_args(given[1:])
        return run_command(lambda: _record(recorded))
    if given[:1] == ["retrieval"]:
        asked = _retrieval_parser().parse_args(given[1:])
        return run_command(lambda: _retrieval(asked))
    arguments = _parser().parse_args(given)
    return run_command(lambda: _bench(arguments, shlex.join(["python", "-m", "lite.bench", *given])))


# -- Arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lite.bench",
        description="Measure exported artifacts: latency, memory and quality in one table. Each runs in a process of "
        "its own, one study at a time and in batches. A research tool: not for clinical use.",
        epilog="python -m lite.bench record ARTIFACT --data LIST.json --out R keeps what the fp16 model does on a list "
        "of studies; with --reference R any other artifact is compared with that, on machines where fp16 does not "
        "fit. python -m lite.bench retrieval is about the towers that find films.\n\n"
        "exit status: 0 done, 1 an artifact or a study failed, 2 wrong use, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llava-rad-lite {__version__}")
    parser.add_argument(
        "artifacts", type=Path, nargs="+", metavar="ARTIFACT", help="folders written by python -m export"
    )
    _add_data(parser)
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="RECORD",
        help="compare with a reference record of the same studies, made by python -m lite.bench record",
    )
    parser.add_argument(
        "--batch-sizes", type=_counts, default="1,4", metavar="N,N", help="studies at a time, for the throughput "
        "(default: %(default)s); all are loaded with room for the largest",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=positive, default=20, metavar="N", help="time at least so many studies one by one, some of them "
        "again if there are fewer (default: %(default)s)",
    )  # fmt: skip
    _add_variants(parser)
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


def _add_variants(parser: argparse.ArgumentParser) -> None:
    """Add what each artifact is measured with again."""
    parser.add_argument(
        "--adapters", type=_names, default=(), metavar="NAME,NAME", help="measure each with these hospitals' adapters, "
        "too: a row for each that an artifact has",
    )  # fmt: skip
    parser.add_argument(
        "--image-tokens", type=_counts, default=(), metavar="N,N", help="measure each with so many image tokens, too: "
        "a row for each number (default: one token a patch)",
    )  # fmt: skip
    parser.add_argument(
        "--image-methods", nargs="+", choices=METHODS, default=[LoadOptions().image_method], metavar="METHOD",
        help=f"how patches become fewer: a row for each of {', '.join(METHODS)} (default: diverse)",
    )  # fmt: skip


def _record_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lite.bench record",
        description="Keep what a model does on a list of studies: tokens, probabilities, texts, times. Run it once "
        "where fp16 fits; python -m lite.bench --reference compares any other artifact with it.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="a folder written by python -m export: fp16")
    _add_data(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="R", help="writes R.json and R.safetensors")
    add_engine(parser)
    return parser


def _retrieval_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lite.bench retrieval",
        description="Measure the towers of retrieval: how often a report finds its film and a film its report, of all "
        "in a list, and what embedding costs. Others are compared with the first.",
    )
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT", help="exported with --retrieval")
    _add_data(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    add_towers(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="LIST.json", help="studies in LLaVA-Rad's evaluation format"
    )
    add_image_folder(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N studies")


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part.strip()) for part in text.split(","))


# -- Commands --------------------------------------------------------------------------------------------------------


def _bench(arguments: argparse.Namespace, command: str) -> int:
    from lite.bench.roofline import modelled_tables
    from lite.bench.run import run_bench
    from lite.bench.table import format_tables, write_json

    job = _job(arguments, command)
    # An hour of measuring would be for nothing where a file cannot be written, or not be made.
    check_writable(arguments.json, arguments.html)
    if arguments.html is not None:
        from lite.bench.report import check_packages, render_report

        check_packages()
    bench = run_bench(job, show_progress)
    modelled = modelled_tables(bench)
    sys.stdout.write(f"{format_tables(bench, modelled)}\n")
    if arguments.json is not None:
        write_json(bench, modelled, arguments.json)
        say(f"figures: {arguments.json}")
    if arguments.html is not None:
        write_whole(arguments.html, render_report(bench, modelled=modelled))
        say(f"report: {arguments.html}")
    return _report_failures(bench)


def _job(arguments: argparse.Namespace, command: str) -> Job:
    from lite.bench.measure import Job

    paths: list[Path] = arguments.artifacts
    for path in paths:
        load_artifact(path)  # a wrong path is found before anything is measured
    known = {name for path in paths for name in load_artifact(path).manifest.parts.adapters}
    if unknown := [name for name in arguments.adapters if name not in known]:
        msg = f"got the adapter {unknown[0]!r} · expected {'one of ' + ', '.join(sorted(known)) if known else 'none'},"
        raise LiteError(f"{msg} as the artifacts have no other · add it with `python -m export adapter`")
    studies = _studies(arguments)
    if arguments.reference is not None:
        studies = _recorded_studies(arguments, studies)
    if arguments.chexbert is not None:
        from lite.eval.chexbert import check_chexbert_files

        check_chexbert_files(arguments.chexbert)
    return Job(
        artifacts=tuple(zip(short_names(paths), paths, strict=True)),
        ways=_ways(arguments),
        image_tokens=arguments.image_tokens,
        image_methods=tuple(arguments.image_methods),
        adapters=arguments.adapters,
        studies=tuple(studies),
        data=str(arguments.data),
        record=arguments.reference,
        batch_sizes=arguments.batch_sizes,
        min_runs=arguments.runs,
        max_new_tokens=arguments.max_new_tokens,
        clinical=Clinical(radgraph=arguments.radgraph, chexbert=arguments.chexbert, device=arguments.device),
        command=command,
    )


def _ways(arguments: argparse.Namespace) -> dict[str, LoadOptions]:
    """Return how to load: "", or by the name of each engine what is asked of that one."""
    given = vars(arguments) | {
        "rows": max(arguments.batch_sizes),
        "verify": False,
        "image_tokens": None,
        "adapters": (),
    }

    def way(**changes: str | None) -> LoadOptions:
        return load_options(argparse.Namespace(**given | changes))

    if arguments.engine != "both":
        return {"": way()}
    # int8 both have; of the floats each computes with its own.
    cache_dtype = "int8" if arguments.cache_dtype == "int8" else None
    return {
        "torch": way(engine="torch", provider=None, cache_dtype=cache_dtype),
        "onnx": way(engine="onnx", device="auto", dtype=None),
    }


def _studies(arguments: argparse.Namespace) -> Sequence[Study]:
    listed = read_studies(arguments.data, image_folder=arguments.image_folder)
    if listed.remark:
        say(f"note: {listed.remark}")
    studies = listed[: arguments.limit]
    check_films(studies, arguments.data, every=False)
    return studies


def _recorded_studies(arguments: argparse.Namespace, studies: Sequence[Study]) -> Sequence[Study]:
    """Take as many studies as the record was made of, where the list begins with those and no limit was asked for."""
    from lite.eval.record import studies_of
    from lite.eval.record_file import read_record

    if arguments.max_new_tokens is not None:
        msg = (
            f"got --max-new-tokens {arguments.max_new_tokens} and a --reference · expected one of them: texts that are "
            "cut cannot be those of the reference · leave one out"
        )
        raise LiteError(msg)
    recorded = studies_of(read_record(arguments.reference), studies)
    if arguments.limit is None and len(recorded) < len(studies):
        say(f"the record is of the first {len(recorded)} of {len(studies)} studies: taking those")
        return recorded
    return studies


def _retrieval(arguments: argparse.Namespace) -> int:
    from lite.bench.retrieval import format_retrieval, run_retrieval
    from lite.bench.table import to_json
    from lite.retrieval.towers import embeddings_id

    check_writable(arguments.json)
    for path in arguments.artifacts:
        embeddings_id(load_artifact(path))
    studies = [study for study in _studies(arguments) if study.reference]
    if not studies:
        msg = f"{arguments.data}: got no study with a report · expected pairs of film and report · take another list"
        raise LiteError(msg)
    options = {name: getattr(arguments, name) for name in ("provider", "threads", "verify")}
    artifacts = list(zip(short_names(arguments.artifacts), arguments.artifacts, strict=True))
    bench = run_retrieval(artifacts, studies, options)
    sys.stdout.write(f"{format_retrieval(bench)}\n")
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(to_json(bench), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return 0


def _report_failures(bench: Bench) -> int:
    failures = [f"error: {row.name}: {row.error}" for row in bench.rows if isinstance(row, FailedRow)]
    for row in bench.rows:
        drafts = () if isinstance(row, FailedRow) else row.drafts
        failures += [f"skipped by {row.name}: {draft.error}" for draft in drafts if draft.error is not None]
    for failure in failures:
        say(failure)
    return EXIT_FAILED if failures else 0


def _record(arguments: argparse.Namespace) -> int:
    from lite.bench.recording import take_record
    from lite.eval.record_file import check_new, record_paths, write_record

    check_new(arguments.out)
    studies = _studies(arguments)
    record = take_record(
        load_model(arguments),
        studies,
        name=arguments.data.name,
        on_progress=lambda done: show_progress("recording", done, len(studies)),
    )
    written = write_record(record, arguments.out)
    sys.stdout.write(f"{written}: {record.describe()}\n{record.describe_tail()}\n")
    bytes_written = sum(path.stat().st_size for path in record_paths(arguments.out))
    sys.stdout.write(f"{bytes_written:,} bytes. Next:\n")
    sys.stdout.write(f"  python -m lite.bench ARTIFACT --data {arguments.data} --reference {arguments.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
