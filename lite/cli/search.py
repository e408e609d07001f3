"""`python -m lite search INDEX TEXT`: find films and reports in an index by words, or by a film."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.cli.options import add_films, add_towers, load_towers
from lite.console import positive, print_line, say
from lite.errors import LiteError

if TYPE_CHECKING:
    from lite.retrieval.ask import Answer
    from lite.retrieval.index import Hit, Index

HELP: Final = "find films and reports in an index, by words or by a film"
DESCRIPTION: Final = (
    "Find the studies of an index that are nearest to a text or to a film, by the cosine of their vectors: the nearest "
    "first, by comparison with every one. Near is not the same as: read what is found."
)
EPILOG: Final = """\
examples:
  python -m lite search past "right apical pneumothorax" --html found.html
  python -m lite search past --image film.dcm --in films"""
NOTICE: Final = "Research use only: not for clinical use."
TOP: Final = 10
WIDTH: Final = 72


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="the folder written by `python -m lite index`")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to look for, in words: a finding, or a report")
    parser.add_argument("--image", type=Path, metavar="FILM", help="look for what is like this film, instead")
    parser.add_argument("--top", type=positive, default=TOP, metavar="N", help="how many to show (default %(default)s)")
    parser.add_argument(
        "--in",
        dest="what",
        choices=["films", "reports"],
        help="what to compare with (default: films for words; for a film reports, where the index has some)",
    )
    parser.add_argument("--artifact", type=Path, metavar="ARTIFACT", help="where the index's artifact is now")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the films to look at, too")
    add_films(parser, "take for --image also what, by its file, is not a frontal chest film")
    add_towers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lite.bench.report import check_packages
    from lite.files import check_writable, write_whole
    from lite.retrieval.ask import ask_film, ask_words, open_index

    if (arguments.text is None) == (arguments.image is None):
        got = "neither a TEXT nor" if arguments.text is None else "a TEXT and"
        raise LiteError(f"got {got} an --image · expected one of them · see python -m lite search --help")
    check_writable(arguments.html)
    if arguments.html:
        check_packages()
    index, artifact = open_index(arguments.index, arguments.artifact)
    top, what = arguments.top, arguments.what
    with load_towers(arguments, artifact) as towers:
        if arguments.image is None:
            answer = ask_words(index, towers, arguments.text, what or "films", top=top)
        else:
            how = {"rendering": arguments.rendering, "any_film": arguments.any_film}
            answer = ask_film(index, towers, arguments.image, what, top=top, **how)
    if answer.remark:
        say(f"note: {answer.remark}")
    if arguments.html:
        write_whole(arguments.html, _page(arguments, index, answer))
    if arguments.json:
        asked = {"text": arguments.text, "image": arguments.image and str(arguments.image), "in": answer.what}
        found = {"index": str(index.path), "artifact_id": index.header.artifact_id, "hits": answer.to_dicts()}
        print_line(json.dumps(asked | found | {"notice": NOTICE}, ensure_ascii=False))
        return 0
    for line in (_of_what(index, answer), *table(answer.hits), NOTICE):
        print_line(line)
    return 0


def _of_what(index: Index, answer: Answer) -> str:
    count = len(index.films if answer.what == "films" else index.reports)
    return f"the {len(answer.hits)} nearest of {count:,} {answer.what} in {index.path}"


def table(hits: tuple[Hit, ...]) -> list[str]:
    """Return a line for each study: rank, cosine, id, and how its report begins, or its film."""
    longest = max(len(hit.study.id) for hit in hits)
    return [
        f"{rank:>4}  {hit.similarity:>6.3f}  {hit.study.id:<{longest}}  {_beginning(hit)}".encode(
            "utf-8", "replace"
        ).decode()
        for rank, hit in enumerate(hits, start=1)
    ]


def _beginning(hit: Hit) -> str:
    report = hit.study.report
    return f"({hit.study.image})" if report is None else textwrap.shorten(report, WIDTH, placeholder=" …")


def _page(arguments: argparse.Namespace, index: Index, answer: Answer) -> str:
    from lite.bench.report import render
    from lite.bench.studies import film_thumbnail

    cards = [(hit, *film_thumbnail(hit.study.image, any_film=True)) for hit in answer.hits]
    asked = None if arguments.image is None else film_thumbnail(str(arguments.image), any_film=True)
    return render(
        "search.html.j2",
        text=arguments.text,
        image=arguments.image,
        asked=asked,
        answer=answer,
        of_what=_of_what(index, answer),
        index=index,
        cards=cards,
        command=shlex.join(["python", "-m", "lite", *sys.argv[1:]]),
    )
