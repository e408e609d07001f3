"""What is said of a divergence: in words beside known figures, and not in silence where an artifact is of no use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny import cache_fidelity

import lite
from lite.__main__ import main
from lite.artifact.judgement import UNUSABLE_KL, USUAL_KL, judge
from lite.config import to_json


@pytest.mark.parametrize(
    ("mean_kl", "said", "is_warning"),
    [
        (0.0, "no more than noise", False),
        (2.5e-5, "no more than noise (float16 against bfloat16: 2.5e-5)", False),
        (4e-4, "as little as 8 bits usually lose (q8_0 of 7B: 4e-4)", False),
        (0.013, "as little as the better forms of 4 bits lose (q4_K_M of 7B: 0.013)", False),
        (0.05, "what 4 bits usually lose (0.01 to 0.1)", False),
        (USUAL_KL, "what 4 bits usually lose", False),
        (0.11, "more than 4 bits usually lose (0.01 to 0.1): compare its texts", True),
        (UNUSABLE_KL, "more than 4 bits usually lose", True),
        (1.0, "not usable (4 bits usually lose 0.01 to 0.1): much of the text will differ", True),
        (float("inf"), "not usable", True),
        (float("nan"), "not usable", True),
    ],
)
def test_a_divergence_is_put_beside_known_figures(mean_kl: float, said: str, is_warning: bool) -> None:
    found = judge(mean_kl, 1.0)
    assert found.text.startswith(said)
    assert found.is_warning is is_warning
    assert "token" not in found.text, "nothing is said of other tokens where there are none"


@pytest.mark.parametrize(
    ("same_top", "said"),
    [
        (0.9988, "1 token in 833"),
        (0.947, "1 token in 19"),
        (0.5, "1 token in 2"),
        (0.1562, "84% of the tokens"),
        (0.0, "100% of the tokens"),
    ],
)
def test_the_share_of_other_tokens_is_said_in_words(same_top: float, said: str) -> None:
    assert judge(0.01, same_top).text.endswith(f"; at {said} another one is the most probable")


def lossy(artifact: Path, kl: float, *, data: str = "built-in", refused: tuple[str, ...] = ()) -> Path:
    file = artifact / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["parts"]["decoder"]["fidelity"] = to_json(dataclasses.replace(cache_fidelity(kl), data=data))
    file.write_text(json.dumps(manifest | {"refused": refused}))
    return artifact


def test_a_heavy_loss_is_said_by_info_and_when_it_is_loaded(
    own_artifact: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    warning = (
        "the decoder has lost 1 nats a token, not usable (4 bits usually lose 0.01 to 0.1): much of the text will "
    )
    warning += (
        "differ · the built-in studies may be unlike what the model knows, --verify-data LIST.json at export gives"
    )
    lossy(own_artifact, 1.0)
    lite.load(own_artifact, device="cpu")
    (said,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert said.getMessage().startswith(f"{own_artifact}: {warning}")
    assert main(["info", str(own_artifact)]) == 0
    told = capsys.readouterr().out
    assert f"\nwarning                 {warning}" in told
    assert "\n  that is               not usable" in told


def test_of_studies_of_ones_own_nothing_is_excused(own_artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    lite.load(lossy(own_artifact, 0.3, data="mine.json"), device="cpu")
    assert caplog.messages[-1].endswith(
        "more than 4 bits usually lose (0.01 to 0.1): compare its texts before you use it"
    )


def test_a_usual_loss_is_no_warning(
    own_artifact: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    lossy(own_artifact, 0.05)
    lite.load(own_artifact, device="cpu")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert main(["info", str(own_artifact)]) == 0
    told = capsys.readouterr().out
    assert "what 4 bits usually lose" in told
    assert "warning" not in told


def test_what_was_kept_though_it_was_refused_says_so(own_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lossy(own_artifact, 0.05, refused=("parity of vision fp32: got cosine 0.1 · expected at least 0.99999",))
    assert main(["info", str(own_artifact)]) == 0
    said = "kept at the export though it was refused: parity of vision fp32: got cosine 0.1 · expected at least 0.99999"
    assert f"\nwarning                 {said}\n" in capsys.readouterr().out
