"""A hospital's own adapter, added to an artifact that is there: `python -m export adapter`.

    base + adapter  ─ wanted ─┐
    what the artifact holds ──┴─▶ low-rank factors beside decoder/ ─▶ measured ─▶ adapters/NAME/

The published LoRA is merged into the artifact's decoder. An adapter that was trained on the base takes its place: the
factors hold what takes the published one out, too, and are of twice the rank. One that was trained on top of it only
adds. The decoder's files are not touched: what the artifact drafts without the adapter stays as it was, bit for bit.

It is measured from the checkpoint with the adapter, in float32, as every decoder is (`export.verify`). What loses more
than is tolerated is not kept; what a correction would make of it is measured then, and said.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from export.adapter_bench import AdapterBench
from export.progress import progress_bar, stage
from export.source.adapter import AdapterSource, HasPairs, Together, Undone, open_adapter
from export.source.checkpoint import Checkpoint, open_checkpoint, projector_shapes
from export.studies import read_judged
from export.write.adapter_part import new_part, write_factors, write_projector
from lite.artifact.judgement import USUAL_KL
from lite.artifact.open import Artifact, load_artifact, sha256_of
from lite.artifact.parts import ADAPTER_NAME, PUBLISHED
from lite.artifact.write import check_target, staged_artifact
from lite.engines.machine import check_device
from lite.errors import ArtifactError, CheckpointError
from lite.files import disk_errors_explained, link_or_copy

if TYPE_CHECKING:
    from export.settings import AdapterSettings, TrainedOn
    from export.studies import NamedStudies
    from lite.artifact.parts import AdapterPart

_LOG = logging.getLogger(__name__)
OFFERED: Final = (16, 64)
"""Ranks of the corrections that are tried where an adapter loses too much."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Sources:
    """What an adapter is made from."""

    wanted: Checkpoint  # the base with the adapter, and its projector: the yardstick
    stored: Checkpoint  # what the artifact's decoder was made of
    delta: HasPairs  # what has to be added to that
    adapter: AdapterSource
    on: TrainedOn


def add_adapter(
    folder: str | Path,
    artifact: str | Path,
    name: str,
    *,
    base: str | Path,
    published: str | Path,
    settings: AdapterSettings,
    out: str | Path | None = None,
) -> Artifact:
    """Add a hospital's LoRA to an artifact.

    Args:
        folder: The LoRA's, as PEFT or LLaVA's scripts have left it.
        artifact: The artifact. Nothing in it is changed.
        name: What requests will call the adapter.
        base: Folder of the base model that the artifact was exported from.
        published: Folder of the LLaVA-Rad download that it was exported from.
        settings: How.
        out: The artifact to make, of the same files and the new ones; None puts it in the place of the old one, once it
            is complete.

    Returns:
        The finished artifact; its part holds as `fidelity` what was measured.

    Raises:
        CheckpointError: The adapter cannot be used, or was trained on something else.
        ArtifactError: The artifact is damaged, was made of something else, has such an adapter already, or the adapter
            loses too much.
        BackendUnavailable: A package or device is missing.
    """
    settings = dataclasses.replace(settings, device=check_device(settings.device))
    source = Path(artifact).resolve()
    target = source if out is None else Path(out).resolve()
    check_target(target, overwrite=out is None)
    opened = load_artifact(source)
    _check_name(opened, name, replace=settings.replace)
    sources = _open_sources(Path(folder), Path(base), Path(published), opened, settings)
    opened.verify()
    _require_same_sources(opened, sources, show=settings.show_progress)
    config = opened.decoder_config()
    tokenizer = opened.file(opened.manifest.parts.tokenizer.file)
    judged = read_judged(tokenizer, opened.manifest, config.max_position_embeddings, settings)
    with disk_errors_explained(target, ArtifactError), staged_artifact(target, overwrite=out is None) as staged:
        kept = {key: part for key, part in opened.manifest.parts.adapters.items() if key != name}
        staging = dataclasses.replace(opened, path=staged.path).with_parts(adapters=kept)
        for file in staging.manifest.files:
            link_or_copy(source / file, staged.path / file)
        part = _written(staging, name, sources, judged, settings)
        staged.finish(staging.manifest.with_parts(adapters=kept | {name: part}))
    return load_artifact(target)


def _check_name(artifact: Artifact, name: str, *, replace: bool) -> None:
    adapters, model = artifact.manifest.parts.adapters, artifact.manifest.model
    if not ADAPTER_NAME.fullmatch(name) or name in (PUBLISHED, "base", "off", model, model.rpartition("/")[2]):
        msg = f"got the name {name!r:.80} · expected at most 64 letters, digits, ., _ and -, and not the model's own"
        raise ArtifactError(f"{msg} ({model}, {PUBLISHED}, base, off) · choose another --name")
    if name in adapters and not replace:
        msg = f"{artifact.path}: got an adapter {name}, which it has · expected a new name · choose another --name, or"
        raise ArtifactError(f"{msg} give --replace")
    if name.lower() in {other.lower() for other in adapters.keys() - {name}}:  # one folder, on some systems
        msg = f"{artifact.path}: got an adapter {name} beside {', '.join(sorted(adapters))} · expected a name that is"
        raise ArtifactError(f"{msg} another in small letters, too · choose another --name")


# -- What it was trained on ------------------------------------------------------------------------------------------


def _open_sources(folder: Path, base: Path, published: Path, artifact: Artifact, settings: AdapterSettings) -> _Sources:
    """Open adapter, base and published model, and find out what is to be added to what."""
    for option, given in (("the adapter", folder), ("--published", published)):
        if not (given / "adapter_config.json").is_file():
            got = "no adapter_config.json" if given.is_dir() else "no folder"
            raise CheckpointError(f"{option} {given}: got {got} · expected the folder of a LoRA · check the path")
    source = open_checkpoint(published, base, other_base=True)
    adapter = open_adapter(folder, source.decoder, projector_shapes(source.decoder, source.tower))
    on = _trained_on(adapter, base, published, artifact, settings.on)
    is_merged = PUBLISHED not in artifact.manifest.parts.adapters
    own: tuple[HasPairs, ...] = (adapter,) if on == "base" else (source.adapter, adapter)
    taken_out: tuple[HasPairs, ...] = (Undone(source.adapter),) if is_merged and on == "base" else ()
    added = (adapter,) if is_merged else own
    return _Sources(
        wanted=dataclasses.replace(source, beside=Together(own), projector=adapter.projector or source.projector),
        stored=source if is_merged else source.apart(),
        delta=Together((*added, *taken_out)),
        adapter=adapter,
        on=on,
    )


def _trained_on(
    adapter: AdapterSource, base: Path, published: Path, artifact: Artifact, asked: TrainedOn | None
) -> TrainedOn:
    """Read from its configuration on which of the two the adapter was trained, unless that is said."""
    said = adapter.config.base_name.lower()
    of_base = {base.resolve().name.lower(), "vicuna-7b-v1.5"}
    of_published = {published.resolve().name.lower(), artifact.manifest.model.rpartition("/")[2].lower()}
    found: TrainedOn | None = "base" if said in of_base - of_published else None
    found = "published" if said in of_published - of_base else found
    named = adapter.config.base_model_name_or_path
    if asked is not None:
        if found not in (None, asked):
            _LOG.warning(
                "got --on %s of an adapter whose configuration names %s · see that its texts are right", asked, named
            )
        return asked
    if found is not None:
        return found
    msg = f"got an adapter whose configuration names {named!r} as its base · expected {base.resolve().name}, or "
    msg += f"{artifact.manifest.model}, into which the published LoRA was merged"
    raise CheckpointError(f"{msg} · say which it was trained on: --on base, or --on published")


def _require_same_sources(artifact: Artifact, sources: _Sources, *, show: bool) -> None:
    """Tell by hash that base and published LoRA are those that the artifact was made of."""
    known = artifact.manifest.sources
    source = sources.stored
    wanted = {name: file for name, file in source.files.items() if name.startswith("base/")}
    wanted |= {f"checkpoint/{file.name}": file for file in source.adapter.files}
    files = {name: file for name, file in wanted.items() if file.suffix in (".bin", ".safetensors")}
    for name, file in progress_bar("hashing the sources", list(files.items()), unit="file", show=show):
        if known.get(name) != sha256_of(file):
            expected = f"sha256 {known[name][:16]}…" if name in known else f"one of {', '.join(sorted(known))}"
            msg = f"{file}: got another file than the artifact was made of · expected {expected}"
            raise CheckpointError(f"{msg} · give the same --base and --published, or export the artifact anew")


# -- Writing and measuring -------------------------------------------------------------------------------------------


def _written(
    artifact: Artifact, name: str, sources: _Sources, judged: NamedStudies, settings: AdapterSettings
) -> AdapterPart:
    """Write the part's files, measure it, and refuse it where it loses too much."""
    show = settings.show_progress
    bench = AdapterBench(sources.wanted, artifact, name, judged, device=settings.device, show_progress=show)
    part = dataclasses.replace(
        new_part(name, sources.on), sources={file.name: sha256_of(file) for file in sources.adapter.files}
    )
    part = write_projector(artifact, part, name, sources.stored, sources.adapter)

    def written(rank: int) -> AdapterPart:
        with stage(f"writing the factors{f', corrected by rank {rank}' if rank else ''}", show=show):
            stored, delta, inputs = sources.stored, sources.delta, bench.inputs
            return write_factors(artifact, part, stored, delta, correction_rank=rank, inputs=inputs if rank else None)

    part = written(0)
    if settings.correction:
        bench.measure(part)
        part = written(settings.correction)
    lost = bench.measure(part)
    tolerance = settings.tolerance or _tolerance(artifact)
    if lost.mean_kl <= tolerance or settings.keep_anyway:
        return dataclasses.replace(part, fidelity=bench.whole(part, lost))
    offers = []
    for rank in OFFERED if not settings.correction else ():
        corrected = bench.measure(written(rank)).mean_kl
        offers.append(f"--correction {rank} would make {corrected:.2g} of it")
    msg = f"{name}: got an adapter that loses {lost.mean_kl:.2g} nats a token beside this decoder · expected at most "
    todo = "; ".join(
        [*offers, "--verify-data measures on films of yours, --tolerance or --keep-anyway takes it as it is"]
    )
    raise ArtifactError(f"{msg}{tolerance:.2g} · {todo}")


def _tolerance(artifact: Artifact) -> float:
    fidelity = artifact.manifest.parts.decoder.fidelity
    return max(USUAL_KL, 2 * fidelity.divergence.mean_kl if fidelity is not None else 0.0)
