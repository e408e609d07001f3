"""What the models of a server are called: the artifact's model by its own name, and each adapter by its own.

Without a name, and by the model's own, a request is drafted as `lite generate` does without `--adapter`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lite.artifact.parts import PUBLISHED
from lite.serve.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.model import FindingsModel


def model_names(model: FindingsModel) -> tuple[str, ...]:
    """Return the names that a request may give, the artifact's model first: the published LoRA is part of that."""
    manifest = model.artifact.manifest
    own = {manifest.parts.default_adapter} & {PUBLISHED}
    return manifest.model, *(name for name in model.decoder.adapters if name not in own)


def asked_model(name: object, names: Sequence[str]) -> str:
    """Return the name of the model that a request means; None means the first.

    Raises:
        Refusal: there is no such model.
    """
    if name is not None and name not in names:
        msg = f"got another model · expected {' or '.join(names)} · see GET /v1/models"
        raise Refusal(404, msg, code="model_not_found", param="model")
    return names[0] if name is None else str(name)


def adapter_of(name: str, names: Sequence[str]) -> str | None:
    """Return the adapter that a model's name means."""
    return None if name == names[0] else name


def entries(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return what `GET /v1/models` lists, as vLLM has it: an adapter is a model that names what it is beside."""
    base, *adapters = ({"id": name, "object": "model", "created": 0, "owned_by": "llava-rad-lite"} for name in names)
    return [base, *(entry | {"root": names[0], "parent": names[0]} for entry in adapters)]
