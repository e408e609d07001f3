"""Lists of studies: what is read, what is refused, and what their hash sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lite.errors import LiteError
from lite.studies.readers import ListedStudy, read_studies, sha256_of_studies


def entry(number: int, **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": f"Report {number}."}]
    return {"id": f"study-{number}", "image": f"{number}.png", "reason": "Cough.", "conversations": turns} | changes


def listed(folder: Path, *entries: object) -> Path:
    path = folder / "list.json"
    path.write_text(json.dumps(entries))
    return path


def test_an_entry_is_read(tmp_path: Path) -> None:
    (study,) = read_studies(listed(tmp_path, entry(1)))
    image = tmp_path / "1.png"
    assert study == ListedStudy(id="study-1", image=image, reason="Cough.", query="Describe.", report="Report 1.")
    (study,) = read_studies(listed(tmp_path, entry(1)), image_folder=Path("elsewhere"))
    assert study.image == Path("elsewhere/1.png")


def test_reason_and_report_may_be_missing(tmp_path: Path) -> None:
    (study,) = read_studies(listed(tmp_path, {"id": 7, "image": "7.png"}))
    assert (study.id, study.reason, study.query, study.report) == ("7", None, "", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "got no list, or an empty one"),
        ('{"id": 1}', "got no list, or an empty one"),
        (json.dumps([entry(1), {"id": "2"}]), "got an entry 2 that is no study"),
        (json.dumps([entry(1, conversations=[])]), "entry 1 that is no study.*not a question and its answer"),
        (json.dumps([entry(1, reason=7)]), "got an entry 1 that is no study"),
        (json.dumps([entry(1), entry(2), entry(1)]), "got the id study-1 again in entry 3"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_bad_list_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(LiteError, match=message):
        read_studies(tmp_path / "list.json")


def test_the_hash_sees_what_the_model_sees(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"a film")
    (tmp_path / "2.png").write_bytes(b"another")
    first, second = entry(1), entry(2)

    def hashed(*entries: object) -> str:
        return sha256_of_studies(read_studies(listed(tmp_path, *entries)))

    whole = hashed(first, second)
    other_report = entry(1, conversations=[{"value": "Q"}, {"value": "Another report."}])
    assert hashed(other_report, second) == whole
    others = {hashed(second, first), hashed(first), hashed(entry(1, reason=None), second), hashed(entry(3), second)}
    (tmp_path / "1.png").write_bytes(b"a film, repainted")
    others.add(hashed(first, second))
    (tmp_path / "1.png").unlink()
    others.add(hashed(first, second))
    assert len(others) == 6
    assert whole not in others
