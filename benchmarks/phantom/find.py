"""Measure how well an artifact's towers find phantoms: by their reports, and by short descriptions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.queries import LABEL_QUERIES, answers, describe
from lite.retrieval.towers import load_retrieval
from lite.studies.sources.listed import read_studies

TOP = (1, 5, 10)


def find(artifact: Path, listed: Path) -> str:
    """Return a page of figures: an artifact's towers on a list that `benchmarks.phantom write` has written.

    Recall beside chance, and beside what labels could do: whoever reads all findings of film and report without error,
    and guesses among studies with the same. Precision of the first ten beside the share that answers: chance.
    """
    entries = json.loads(listed.read_text(encoding="utf-8"))
    found = [answers(sample_study(entry["phantom"]["seed"])) for entry in entries]
    studies = read_studies(listed)
    with load_retrieval(artifact) as towers:
        films = towers.embed_images([study.path for study in studies])
        reports = towers.embed_texts([study.reference for study in studies])
        queries = towers.embed_texts([describe(query) for query in LABEL_QUERIES])
    similarity = reports @ films.T
    alike = np.array([sum(other == mine for other in found) for mine in found])
    rows = {
        "report to film": recall(similarity),
        "film to report": recall(similarity.T),
        "by all findings": [float(np.minimum(1, k / alike).mean()) for k in TOP],
        "chance": [k / len(found) for k in TOP],
    }
    lines = [f"{len(found)} studies, {len(set(found))} of them with other findings", f"{'':22} R@1   R@5   R@10"]
    lines += [f"{name:20} " + " ".join(f"{value:5.3f}" for value in values) for name, values in rows.items()]
    lines += ["", f"{'':38}P@10  chance  answer"]
    nearest = np.argsort(-(queries @ films.T), axis=1, kind="stable")[:, : TOP[-1]]
    means = []
    for query, rows_found in zip(LABEL_QUERIES, nearest, strict=True):
        right = np.array([query in here for here in found])
        means.append(right[rows_found].mean())
        lines.append(f"{describe(query):38}{means[-1]:4.2f}  {right.mean():6.3f}  {right.sum():6}")
    return "\n".join([*lines, f"{'mean':38}{np.mean(means):4.2f}"])


def recall(similarity: NDArray[np.float32]) -> list[float]:
    """Return how often a row's own column is among the nearest k, of TOP; who is as near counts as nearer."""
    places = (similarity >= np.diag(similarity)[:, None]).sum(axis=1)
    return [float((places <= k).mean()) for k in TOP]
