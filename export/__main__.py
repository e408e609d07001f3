"""The command line of the exporter: `python -m export --help`."""

from __future__ import annotations

import dataclasses
import glob
import sys
from typing import TYPE_CHECKING, Any

from export.options import adapter_parser, check_parser, export_parser, onnx_parser
from export.settings import AdapterSettings, ExportSettings, GptqSettings, OnnxSettings
from export.summary import adapter_summary, export_summary, onnx_summary
from lite.console import print_line, run_command, say

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from _typeshed import DataclassInstance


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["onnx"]:
        return _add_onnx(given[1:])
    if given[:1] == ["adapter"]:
        return _add_adapter(given[1:])
    if given[:1] == ["check"]:
        options = check_parser().parse_args(given[1:])
        return run_command(lambda: _check(options))
    options = export_parser().parse_args(given)
    return run_command(lambda: _export(options), interrupted=lambda: _what_an_interrupt_leaves(options))


def _export(options: argparse.Namespace) -> int:
    from export import export_artifact

    artifact = export_artifact(options.checkpoint, options.base, options.out, _settings(options))
    _name_what_is_left(artifact.path)
    print_line(export_summary(artifact))
    return 0


def _name_what_is_left(out: Path) -> None:
    """Name the unfinished folders beside an artifact."""
    out = out.resolve()
    for left in sorted(out.parent.glob(f".{glob.escape(out.name)}.*.partial*")):
        say(f"note: {left} is left from an export that was killed: remove it, unless one is running")


def read_settings(options: Sequence[str]) -> ExportSettings:
    """Return the settings that these options ask for, as an export with them would have.

    Raises:
        ArtifactError: They exclude each other, or one would change nothing.
    """
    return _settings(export_parser().parse_args(["--checkpoint", ".", "--base", ".", "--out", ".", *options]))


def _settings(options: argparse.Namespace) -> ExportSettings:
    return ExportSettings(
        decoder_format=options.decoder,
        vision_format=options.vision,
        gptq=GptqSettings(**_given(GptqSettings, options)),
        onnx=options.engine == "onnx",
        text_format=options.text,
        **_given(ExportSettings, options),
    )


def _given(settings: type[DataclassInstance], options: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line has of settings, by name."""
    names = {field.name for field in dataclasses.fields(settings)}
    return {name: value for name, value in vars(options).items() if name in names}


def _what_an_interrupt_leaves(options: argparse.Namespace) -> str:
    from export.write.work import work_path

    if (options.out / "manifest.json").is_file() and not options.overwrite:
        return f"interrupted: the artifact at {options.out} is complete"
    kept = work_path(options.out)
    what_now = "and nothing is left behind"
    if kept.exists():
        what_now = f"the same command goes on with the finished parts in {kept}; remove that folder to give up"
    return f"interrupted: no artifact at {options.out} · {what_now}"


def _add_onnx(arguments: list[str]) -> int:
    """Run `python -m export onnx`; return the exit status."""
    options = onnx_parser().parse_args(arguments)
    return run_command(
        lambda: _export_onnx(options), interrupted=lambda: f"interrupted: {options.artifact} is as it was"
    )


def _export_onnx(options: argparse.Namespace) -> int:
    from export import add_onnx

    artifact = add_onnx(options.artifact, OnnxSettings(**_given(OnnxSettings, options)), out=options.out)
    _name_what_is_left(artifact.path)
    print_line(onnx_summary(artifact))
    return 0


def _add_adapter(arguments: list[str]) -> int:
    """Run `python -m export adapter`; return the exit status."""
    options = adapter_parser().parse_args(arguments)
    return run_command(
        lambda: _export_adapter(options), interrupted=lambda: f"interrupted: {options.artifact} is as it was"
    )


def _export_adapter(options: argparse.Namespace) -> int:
    from export import add_adapter

    artifact = add_adapter(
        options.adapter,
        options.artifact,
        options.name,
        base=options.base,
        published=options.published,
        settings=AdapterSettings(**_given(AdapterSettings, options)),
        out=options.out,
    )
    _name_what_is_left(artifact.path)
    print_line(adapter_summary(artifact, options.name))
    return 0


def _check(options: argparse.Namespace) -> int:
    from export.source.checkpoint import open_checkpoint

    source = open_checkpoint(options.checkpoint, options.base, other_base=options.other_base)
    base = source.adapter.config.base_model_name_or_path or "a base without a name"
    shape = f"{source.decoder.num_hidden_layers} decoder layers, {source.tower.num_patches} image tokens"
    print_line(f"{source.name} on {base}: whole, {shape}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
