"""The labeller against hand-labelled sentences in the style of real reports, and against the phantom's grammar.

Expectations are written `label+` (positive), `label-` (negative) or `label?` (uncertain), with side and size behind
where they matter; every label that is not named has to be absent. The sentences were composed for this test and
labelled before the labeller saw them.
"""

from __future__ import annotations

import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.report import write_findings
from lite.eval.labels import LABELS, Label, Mention, Reading, read_labels, read_mentions
from lite.eval.labels.vocabulary import table

SHORT: dict[str, Label] = {
    "nothing": "No Finding",
    "mediastinum": "Enlarged Cardiomediastinum",
    "heart": "Cardiomegaly",
    "lesion": "Lung Lesion",
    "opacity": "Lung Opacity",
    "edema": "Edema",
    "consolidation": "Consolidation",
    "pneumonia": "Pneumonia",
    "atelectasis": "Atelectasis",
    "pneumothorax": "Pneumothorax",
    "effusion": "Pleural Effusion",
    "pleura": "Pleural Other",
    "fracture": "Fracture",
    "devices": "Support Devices",
}
LABELLED = Path(__file__).with_name("labelled_reports.toml")
MARKS = {"+": "positive", "-": "negative", "?": "uncertain"}


def expectations(text: str) -> dict[Label, tuple[str, set[str]]]:
    """Parse "effusion+ left small, pneumothorax-"."""
    expected: dict[Label, tuple[str, set[str]]] = {}
    for item in filter(None, text.split(", ")):
        name, *attributes = item.split()
        expected[SHORT[name[:-1]]] = (MARKS[name[-1]], set(attributes))
    return expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [case for cases in tomllib.loads(LABELLED.read_text(encoding="utf-8")).values() for case in cases],
)
def test_reads_what_a_radiologist_reads(text: str, expected: str) -> None:
    readings = read_labels(text)
    wanted = expectations(expected)
    got = {label: reading.status for label, reading in readings.items()}
    statuses = {label: wanted[label][0] if label in wanted else "absent" for label in LABELS}
    if "No Finding" not in wanted:
        statuses["No Finding"] = got["No Finding"]
    assert got == statuses
    for label, (_, attributes) in wanted.items():
        assert attributes <= {readings[label].side, readings[label].size}


def test_reads_the_grammar_of_the_phantom_without_a_single_error() -> None:
    for seed in range(7_000_000, 7_002_000):
        report = write_findings(sample_study(seed), np.random.default_rng([seed, 2]))
        assert read_labels(report.text) == dict(report.readings), report.text


def test_a_mention_points_into_the_report() -> None:
    text = "FINDINGS:\n  Small\n left-sided  pleural\n effusion.\tNo pneumo-\nthorax, but a PTX."
    mentions = read_mentions(text)
    assert [text[mention.start : mention.end] for mention in mentions] == [mention.text for mention in mentions]
    assert [mention.status for mention in mentions] == ["positive", "negative", "positive"]
    assert mentions[0] == Mention(
        label="Pleural Effusion",
        status="positive",
        side="left",
        zone=None,
        size="small",
        text="effusion",
        start=text.index("effusion"),
        end=text.index("effusion") + len("effusion"),
    )


def test_lines_end_as_windows_ends_them() -> None:
    text = "INDICATION: Pneumothorax.\r\n\r\nFINDINGS:\r\nSmall left\r\neffusion.\r\nHeart size normal\r\nNo edema\r\n"
    statuses = {m.label: m.status for m in read_mentions(text)}
    assert statuses == {"Pleural Effusion": "positive", "Cardiomegaly": "negative", "Edema": "negative"}


def test_characters_whose_lower_case_is_longer_do_not_move_the_mentions() -> None:
    text = "İİİ\u00a0— No “pneumothorax”… ﬁne"
    (mention,) = read_mentions(text)
    assert (mention.text, mention.status) == ("pneumothorax", "negative")
    assert text[mention.start : mention.end] == "pneumothorax"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("No effusion. Possible effusion. Small effusion.", "positive"),
        ("No effusion. Possible effusion.", "uncertain"),
        ("No effusion.", "negative"),
        ("Nothing of the kind.", "absent"),
    ],
)
def test_positive_wins_over_uncertain_over_negative(text: str, status: str) -> None:
    assert read_labels(text)["Pleural Effusion"].status == status


def test_attributes_unite_over_the_mentions_that_decide() -> None:
    readings = read_labels("Small right effusion. Large left effusion. Possible moderate effusion.")
    assert readings["Pleural Effusion"] == Reading(status="positive", side="bilateral", zone=None, size="large")
    readings = read_labels("Left upper lobe nodule. Left lower lobe nodule.")
    assert readings["Lung Lesion"] == Reading(status="positive", side="left", zone=None, size="small")


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("Left PICC with tip in the right atrium.", "left"),
        ("Left pacemaker with leads in the right atrium and right ventricle.", "left"),
        ("Endotracheal tube in the right mainstem bronchus.", None),
        ("Trachea is deviated to the left. Endotracheal tube in place.", None),
        ("Right chest tube. Left chest tube.", "bilateral"),
    ],
)
def test_anatomy_on_the_way_gives_a_device_no_side(text: str, side: str | None) -> None:
    assert read_labels(text)["Support Devices"].side == side


@pytest.mark.parametrize(
    ("text", "zone"),
    [
        ("Nodule in the right upper lobe.", "upper"),
        ("RLL nodule.", "lower"),
        ("Nodule at the left lung apex.", "upper"),
        ("Perihilar nodule on the right.", "mid"),
        ("Nodule.", None),
    ],
)
def test_zones(text: str, zone: str | None) -> None:
    assert read_labels(text)["Lung Lesion"].zone == zone


def test_no_finding_ignores_devices_but_not_abnormalities_without_a_label() -> None:
    assert read_labels("Endotracheal tube in place. Lungs are clear.")["No Finding"].status == "positive"
    assert read_labels("No emphysema. Heart size is normal.")["No Finding"].status == "positive"
    assert read_labels("Emphysema. Heart size is normal.")["No Finding"].status == "absent"
    assert read_labels("Possible pneumonia.")["No Finding"].status == "absent"


def test_every_table_of_phrases_is_keyed_by_labels() -> None:
    assert set(table("findings")) == set(LABELS) - {"No Finding"}
    for name in ("doubtful_findings", "exclusions", "structures"):
        assert set(table(name)) < set(LABELS)


@pytest.mark.parametrize("text", [None, "", " \n\t ", "___", "...", "XXXX XXXX", "12345", "心臓は正常"])
def test_text_that_says_nothing_is_a_report_without_findings(text: str | None) -> None:
    assert read_mentions(text) == []
    assert read_labels(text) == {
        label: Reading(status="positive" if label == "No Finding" else "absent") for label in LABELS
    }


@pytest.mark.parametrize(
    "unit",
    ["a", " ", "\n", ".", "no ", "effusion ", "no effusion, ", "left right and ", "the heart the mediastinum ",
     "NO EFFUSION\n", "a ? ", "chest, ", "indication: findings: ", "No effusion. ", "mediastinal and hilar, "],
)  # fmt: skip
def test_time_grows_in_proportion_to_the_text(unit: str) -> None:
    start = time.process_time()
    read_labels(unit * (100_000 // len(unit)))
    # CPU time: 0.1 to 1 s on a slow core; anything quadratic takes many minutes.
    assert time.process_time() - start < 60
