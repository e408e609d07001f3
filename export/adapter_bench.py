"""What an adapter loses beside a decoder, what it is worth, and which texts come of it.

    checkpoint  base + adapter, float32, its own projector ──▶ p(token | …)  ─┐
    artifact    decoder/ + factors ──────────────────────────▶ q(token | …)  ─┼▶ KL(p‖q)
                decoder/ alone ──────────────────────────────▶ …             ─┘
                decoder.onnx + factors ──────────────────────▶ s(token | …)  ───▶ KL(q‖s)
    texts       drafted by the artifact; is each token the one that p holds to be the most probable?

A greedy text is the checkpoint's own where it would have chosen each of its tokens: that is seen by scoring the text,
and no text has to be written in float32.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from export.logits import InputSizes, artifact_logits, draft_texts, expand, onnx_logits, source_logits
from export.progress import stage
from export.studies import FilmStudies, NamedStudies, by_film
from export.verify import artifact_features, divergence_of, source_features
from lite.artifact.parts import AdapterFidelity
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.protocol import NO_ADAPTER
from lite.engines.torch_engine.load import load_decoder
from lite.eval.labels import read_labels
from lite.eval.metrics import label_f1
from lite.memory.counts import decoder_bytes
from lite.prompt import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from export.source.checkpoint import Checkpoint
    from export.studies import EncodedStudy
    from lite.artifact.open import Artifact
    from lite.artifact.parts import AdapterPart, Divergence
    from lite.engines.protocol import Engine

_BUILT_IN: Final = "built-in"
MAX_EXPANDED_BYTES: Final = 4 << 30
"""What a decoder may take in float32 for texts to be drafted by torch on a CPU, where packed weights are expanded for
every token."""


class AdapterBench:
    """Measures an adapter of an artifact that is being written, perhaps several times."""

    def __init__(
        self,
        wanted: Checkpoint,
        artifact: Artifact,
        name: str,
        judged: NamedStudies,
        *,
        device: str,
        show_progress: bool,
    ) -> None:
        """Compute what the checkpoint with the adapter does: the yardstick.

        Args:
            wanted: The checkpoint, with the adapter in the place of its own LoRA, or beside it.
            artifact: Without the adapter.
            name: The adapter's.
            judged: The studies to measure on.
            device: Where torch computes.
            show_progress: Draw bars.
        """
        self.wanted, self.artifact, self.name, self.judged = wanted, artifact, name, judged
        self.device, self.show = device, show_progress
        self.films = by_film(judged.studies)
        self.inputs = InputSizes()
        with stage("measuring, the checkpoint with the adapter", show=self.show):
            self.source_features = source_features(wanted, self.films, device)
            self.expected = source_logits(wanted, self.films, self.source_features, device, show=self.show)

    def measure(self, part: AdapterPart) -> Divergence:
        """Measure the artifact with the adapter as its files are now, and note what its linears read."""
        self.inputs = InputSizes()
        return divergence_of(self.films, self.expected, self._logits(part, self.inputs))

    def whole(self, part: AdapterPart, divergence: Divergence) -> AdapterFidelity:
        """Measure all else of an adapter that is kept."""
        films, without = self.films, self.artifact
        with stage("measuring, without the adapter", show=self.show):
            features = artifact_features(without, films)
            default = without.manifest.parts.default_adapter
            (logits,) = artifact_logits(without, films, features, self.device, show=self.show, adapter=default)
        fidelity = AdapterFidelity(
            data=self.judged.data, divergence=divergence, without=divergence_of(films, self.expected, logits)
        )
        artifact = self._with(part)
        if artifact.manifest.parts.decoder_onnx is not None:
            logits, features = self._logits(part), self._features(artifact)
            with stage("measuring, decoder.onnx", show=self.show):
                behind = onnx_logits(artifact, films, features, None, adapter=self.name)
            fidelity = dataclasses.replace(fidelity, onnx=divergence_of(films, logits, behind))
            if artifact.onnx_part().int8_cache is not None:
                rounded = onnx_logits(artifact, films, features, "int8", adapter=self.name)
                fidelity = dataclasses.replace(fidelity, int8_cache=divergence_of(films, behind, rounded))
        return self._with_texts(artifact, fidelity)

    def _with(self, part: AdapterPart) -> Artifact:
        others = self.artifact.manifest.parts.adapters
        return self.artifact.with_parts(adapters=others | {self.name: part})

    def _features(self, artifact: Artifact) -> list[Tensor]:
        return artifact_features(artifact, self.films, self.name)

    def _logits(self, part: AdapterPart, inputs: InputSizes | None = None) -> list[Tensor]:
        artifact = self._with(part)
        with stage("measuring, the artifact with the adapter", show=self.show):
            (logits,) = artifact_logits(
                artifact,
                self.films,
                self._features(artifact),
                self.device,
                show=self.show,
                adapter=self.name,
                inputs=inputs,
            )
        return logits

    # -- Texts -------------------------------------------------------------------------------------------------------

    def _with_texts(self, artifact: Artifact, fidelity: AdapterFidelity) -> AdapterFidelity:
        """Draft texts with the adapter, and see which are the checkpoint's; and read their labels."""
        has_reports = self.judged.data != _BUILT_IN
        engine = self._engine(artifact)
        if engine is None:
            return fidelity
        with stage("drafting", show=self.show):
            drafted = self._drafted(engine, self._features(artifact), self.name)
            plain = []
            if has_reports:
                default = artifact.manifest.parts.default_adapter
                plain = self._drafted(engine, artifact_features(artifact, self.films), default)
            del engine
        with stage("measuring, the checkpoint's texts", show=self.show):
            films = [FilmStudies(studies=tuple(studies)) for studies in drafted]
            logits = source_logits(self.wanted, films, self.source_features, self.device, show=self.show)
        studies = [study for film in drafted for study in film]
        same = [
            scored.argmax(-1).tolist() == list(study.target_ids) for study, scored in zip(studies, logits, strict=True)
        ]
        return dataclasses.replace(
            fidelity,
            texts=len(same),
            same_texts=sum(same) / len(same),
            label_f1=self._label_f1(drafted) if has_reports else None,
            label_f1_without=self._label_f1(plain) if has_reports else None,
        )

    def _engine(self, artifact: Artifact) -> Engine[Any, Any] | None:
        """Load what the runtime would draft with; None where a token would take many seconds."""
        default = artifact.manifest.parts.default_adapter
        names = (self.name,) if default is None else (self.name, default)
        if self.device != "cpu":
            return load_decoder(artifact, device=self.device, adapters=names)
        if artifact.manifest.parts.decoder_onnx is not None:
            return OnnxDecoder(artifact, adapters=names)
        if (
            decoder_bytes(dataclasses.replace(artifact.decoder_config(), quantization=None), itemsize=4)
            > MAX_EXPANDED_BYTES
        ):
            return None
        decoder = load_decoder(artifact, device=self.device, adapters=names)
        expand(decoder)
        return decoder

    def _drafted(
        self, engine: Engine[Any, Any], features: list[Tensor], adapter: str | None
    ) -> list[list[EncodedStudy]]:
        slot = NO_ADAPTER if adapter is None else list(engine.adapters).index(adapter)
        decoding = self.artifact.manifest.decoding
        how = {"limit": decoding.max_new_tokens, "eos_token_id": decoding.eos_token_id}
        return draft_texts(engine, self.films, features, adapter=slot, show=self.show, **how)

    def _label_f1(self, drafted: list[list[EncodedStudy]]) -> float:
        """Return the macro label F1 of texts against the reports."""
        manifest = self.artifact.manifest
        tokenizer = Tokenizer(self.artifact.file(manifest.parts.tokenizer.file), manifest.decoding)
        studies = [study for film in drafted for study in film]
        texts = [read_labels(tokenizer.decode(study.target_ids)) for study in studies]
        return float(label_f1([read_labels(study.findings) for study in studies], texts).macro.value)
