"""What source and artifact predict along the judged studies: the logits of every token of their findings.

Almost all that a study costs is its film, 1,400 tokens of 1,500. So what studies share is computed once: the film and
what lies before it (`export.studies.FilmStudies`), also for an int8 cache, which the film's own tokens do not read.
Decoders are computed a layer at a time over all studies, so that 7B parameters need the memory of one layer; each layer
is read, and what is packed is expanded, once.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from export.progress import progress_bar
from export.quantize.calibration import embed
from export.source import forward
from kernels.reference import ROWS_VALUES, quantize_vectors
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.protocol import NO_ADAPTER
from lite.engines.segments import divide, expand_image, score
from lite.engines.torch_engine.linear import linears_of
from lite.engines.torch_engine.load import load_decoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from export.source.checkpoint import Checkpoint
    from export.studies import EncodedStudy, FilmStudies
    from kernels.weights import StoredWeight
    from lite.artifact.open import Artifact
    from lite.artifact.parts import CacheDtype
    from lite.engines.onnx_engine.cache import OnnxCache
    from lite.engines.protocol import Engine
    from lite.engines.torch_engine.cache import KVCache
    from lite.engines.torch_engine.decoder import LlamaDecoder


@torch.inference_mode()
def source_logits(
    checkpoint: Checkpoint, films: Sequence[FilmStudies], features: Sequence[Tensor], device: str, *, show: bool
) -> list[Tensor]:
    """Compute the source's logits plainly, in float32, with LoRA beside the weights.

    Args:
        checkpoint: The source.
        films: The studies.
        features: Of each film, [P, hidden_size].
        device: Where to compute.
        show: Draw a bar.

    Returns:
        Per study, in the order of the films, [len(target_ids), vocab_size], float32, on the CPU.
    """
    config = checkpoint.decoder
    embeddings = checkpoint.read_base("model.embed_tokens.weight")
    packed = [_pack(film, image, embeddings) for film, image in zip(films, features, strict=True)]
    del embeddings
    hidden = [x.to(device) for x, _ in packed]
    sequences = [[rows.to(device) for rows in each] for _, each in packed]
    for index in progress_bar("running the source", range(config.num_hidden_layers), unit="layer", show=show):
        layer = checkpoint.read_layer(index)
        linear = forward.source_linear(layer, device)
        norms = {name: weight for name, weight in layer.weights.items() if name.endswith("norm.weight")}
        del layer
        for place, rows in enumerate(sequences):
            hidden[place] = forward.decoder_layer(config, norms, linear, hidden[place], rows)
        del linear
    norm = checkpoint.read_base("model.norm.weight")
    head = checkpoint.read_base("lm_head.weight").to(device, torch.float32)
    scored = [
        x[rows[-len(study.target_ids) :]]
        for film, x, each in zip(films, hidden, sequences, strict=True)
        for study, rows in zip(film.studies, each, strict=True)
    ]
    return [torch.nn.functional.linear(forward.rms_norm(x, norm, config.rms_norm_eps), head).cpu() for x in scored]


def _pack(film: FilmStudies, image: Tensor, embeddings: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Embed studies with what they share once, [T, C]; say of each which rows it is."""
    whole = [embed(study, image, embeddings) for study in film.studies]
    shared = film.num_shared(len(image))
    parts, sequences, end = [whole[0][:shared]], [], shared
    for sequence in whole:
        parts.append(sequence[shared:])
        begin, end = end, end + len(parts[-1])
        sequences.append(torch.cat([torch.arange(shared), torch.arange(begin, end)]))
    return torch.cat(parts), sequences


# -- decoder/ --------------------------------------------------------------------------------------------------------


class _Film:
    """A film and its studies on their way through the decoder, as the runtime reads them (`lite.engines.segments`)."""

    def __init__(
        self,
        decoder: LlamaDecoder,
        film: FilmStudies,
        image: Tensor,
        cache_dtypes: Sequence[CacheDtype | None],
        adapter: int,
    ) -> None:
        """Embed it."""
        self.adapter = adapter
        first, at = film.studies[0], film.studies[0].image_at
        self.shared = decoder.embed(first.input_ids[: at + 1], image)
        texts = [
            (decoder.embed(study.input_ids[at + 1 :]), decoder.embed(study.target_ids[:-1])) for study in film.studies
        ]
        self.texts = {dtype: list(texts) for dtype in cache_dtypes}
        self.room = len(self.shared) + max(len(question) + len(text) for question, text in texts)

    def through_layer(self, decoder: LlamaDecoder) -> dict[CacheDtype | None, list[Tensor]]:
        """Read it by a decoder of one layer; return of each study what the head takes, for each kind of cache.

        A text is computed behind its prompt, as it is when it is decoded: what an int8 cache loses is lost there.
        """
        cache, num_shared = decoder.new_cache(1, self.room), len(self.shared)
        after, _ = decoder(self.shared[None], cache, adapter=self.adapter)
        self.shared = after[0]
        scored = {}
        for dtype, texts in self.texts.items():
            # What a study leaves behind the film is overwritten by the next, or not seen.
            behind = _rounded(decoder, cache, num_shared) if dtype == "int8" else cache
            scored[dtype] = [self._through_texts(decoder, behind, texts, place) for place in range(len(texts))]
        return scored

    def _through_texts(
        self, decoder: LlamaDecoder, cache: KVCache, texts: list[tuple[Tensor, Tensor]], place: int
    ) -> Tensor:
        question, text = texts[place]
        start = len(self.shared)
        after, normed = decoder(question[None], cache, start=start, adapter=self.adapter)
        texts[place] = after[0], text
        last: Tensor = normed[0, -1:]
        if not len(text):
            return last
        behind = start + len(question)
        after_text, normed = decoder(text[None], cache, start=behind, reads_cache=True, adapter=self.adapter)
        texts[place] = after[0], after_text[0]
        return torch.cat((last, normed.squeeze(0)))


def _rounded(decoder: LlamaDecoder, cache: KVCache, length: int) -> KVCache:
    """Return an int8 cache of the same size, that has read the same first tokens."""
    decoder.quantizes_cache = True
    rounded = decoder.new_cache(1, cache.max_seq_len)
    decoder.quantizes_cache = False
    for exact, values, scales in (
        (cache.k_cache, rounded.k_cache, rounded.k_scales),
        (cache.v_cache, rounded.v_cache, rounded.v_scales),
    ):
        if scales is not None:
            found = quantize_vectors(exact[..., :length, :], scales.dtype)
            values[..., :length, :], scales[..., :length] = found
    return rounded


@torch.inference_mode()
def artifact_logits(
    artifact: Artifact,
    films: Sequence[FilmStudies],
    features: Sequence[Tensor],
    device: str,
    *,
    show: bool,
    cache_dtypes: Sequence[CacheDtype | None] = (None,),
    adapter: str | None = None,
    inputs: InputSizes | None = None,
) -> list[list[Tensor]]:
    """Compute the same with the runtime's decoder from the files just written, once for each kind of cache.

    With an adapter beside it, if one is named; `inputs` sees what the linears read.
    """
    adapters, slot = ((), NO_ADAPTER) if adapter is None else ((adapter,), 0)
    reading: list[_Film] = []
    scored: list[dict[CacheDtype | None, list[Tensor]]] = []
    num_hidden_layers = artifact.decoder_config().num_hidden_layers
    for index in progress_bar("running the artifact", range(num_hidden_layers), unit="layer", show=show):
        decoder = load_decoder(artifact, device=device, layers=range(index, index + 1), adapters=adapters)
        expand(decoder)
        if inputs is not None:
            inputs.watch(decoder, index)
        if not reading:
            pairs = zip(films, features, strict=True)
            reading = [_Film(decoder, film, image, cache_dtypes, slot) for film, image in pairs]
        scored = [film.through_layer(decoder) for film in reading]
        if index + 1 < num_hidden_layers:
            del decoder
    return [[decoder.head_logits(x).cpu() for film in scored for x in film[dtype]] for dtype in cache_dtypes]


class InputSizes:
    """How large the inputs of each linear are: the root mean square of each channel, over all tokens that pass."""

    def __init__(self) -> None:
        """Begin with none."""
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def watch(self, decoder: LlamaDecoder, layer: int) -> None:
        """Look at what the linears of a decoder of one layer read."""
        for name, linear in linears_of(decoder.model.layers[0]).items():
            owner = name.rpartition(".")[0]
            parts = [f"model.layers.{layer}.{owner}.{part}" for part in linear.parts]

            def note(_: object, given: tuple[Tensor, ...], parts: list[str] = parts) -> None:
                x = given[0].flatten(0, -2).float()
                for part in parts:
                    total, count = self._sums.get(part, (torch.zeros(()), 0))
                    self._sums[part] = total + x.square().sum(0).cpu(), count + len(x)

            linear.register_forward_pre_hook(note)

    def of(self, linear: str) -> Tensor:
        """Return the sizes of `model.layers.0.self_attn.q_proj`, [in]."""
        total, count = self._sums[linear]
        return (total / count).sqrt()


def expand(decoder: LlamaDecoder) -> None:
    """Expand what is packed, where each product would do it anew: on a GPU there are kernels that need not."""
    if decoder.device.type != "cpu":
        return
    for linear in linears_of(decoder.model).values():
        linear.weights = tuple(
            weight if isinstance(weight, torch.Tensor) else _expanded(weight, decoder.dtype)
            for weight in linear.weights
        )


def _expanded(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    N, K = weight.shape
    values = torch.empty(N, K, dtype=dtype)
    step = max(1, ROWS_VALUES // K)
    for begin in range(0, N, step):
        end = min(begin + step, N)
        values[begin:end] = weight.rows(begin, end, dtype)
    return values


# -- decoder.onnx ----------------------------------------------------------------------------------------------------


def onnx_logits(
    artifact: Artifact,
    films: Sequence[FilmStudies],
    features: Sequence[Tensor],
    cache_dtype: CacheDtype | None,
    *,
    int8_prompts: bool = False,
    adapter: str | None = None,
) -> list[Tensor]:
    """Compute the same with decoder.onnx."""
    adapters, slot = ((), NO_ADAPTER) if adapter is None else ((adapter,), 0)
    decoder = OnnxDecoder(artifact, cache_dtype=cache_dtype, int8_prompts=int8_prompts, adapters=adapters)
    read = (read_film(decoder, film, image.numpy(), slot) for film, image in zip(films, features, strict=True))
    return [torch.from_numpy(logits) for studies in read for _, _, logits in studies]


def read_film(
    decoder: OnnxDecoder, film: FilmStudies, image: NDArray[np.float32], adapter: int = NO_ADAPTER
) -> Iterator[tuple[EncodedStudy, OnnxCache, NDArray[np.float32]]]:
    """Read the studies of a film; yield each, the cache that then holds it, and its logits."""
    cache, start = decoder.new_cache(1, max(study.num_tokens(len(image)) for study in film.studies)), 0
    for study in film.studies:
        ids = study.input_ids, study.target_ids
        logits = score(decoder, *ids, image, num_image_tokens=len(image), cache=cache, start=start, adapter=adapter)
        yield study, cache, logits
        start = film.num_shared(len(image))


# -- Texts -----------------------------------------------------------------------------------------------------------


def draft_texts(
    engine: Engine[Any, Any],
    films: Sequence[FilmStudies],
    features: Sequence[Tensor],
    *,
    adapter: int,
    limit: int,
    eos_token_id: int,
    show: bool,
) -> list[list[EncodedStudy]]:
    """Write the findings of each study, greedily; return the studies, by film, with these as their targets.

    Args:
        engine: What the runtime would compute with.
        films: The studies.
        features: Of each film, [P, hidden_size].
        adapter: Its place among those of the engine.
        limit: Tokens of a text, at most.
        eos_token_id: Ends a text, and is its last target.
        show: Draw a bar.
    """
    drafted = []
    pairs = list(zip(films, features, strict=True))
    for film, image in progress_bar("drafting", pairs, unit="film", show=show):
        texts: dict[tuple[int, ...], tuple[int, ...]] = {}  # what several studies ask is answered once
        for study in film.studies:
            if study.input_ids not in texts:
                ids = expand_image(study.input_ids, len(image))
                texts[study.input_ids] = _draft(engine, ids, image.numpy(), adapter, limit, eos_token_id)
        drafted.append([dataclasses.replace(study, target_ids=texts[study.input_ids]) for study in film.studies])
    return drafted


def _draft(
    engine: Engine[Any, Any], ids: tuple[int, ...], image: NDArray[np.float32], adapter: int, limit: int, eos: int
) -> tuple[int, ...]:
    length = min(len(ids) + limit, engine.config.max_position_embeddings)
    cache, token_ids = engine.new_cache(1, length), []
    chosen = None
    for segment in divide(ids, chunk_size=engine.chunk_size, image_features=image, adapter=adapter):
        chosen = engine.extend(segment, cache)
    while chosen is not None:
        token_ids.append(chosen.wait()[0].token_ids[0])
        chosen = None if token_ids[-1] == eos or len(ids) + len(token_ids) >= length else engine.decode(cache)
    return tuple(token_ids)
