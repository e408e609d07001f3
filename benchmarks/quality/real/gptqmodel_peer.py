"""GPTQModel's own pipeline on a decoder and token ids it is given: run by Python of its environment, never imported.

    python -I gptqmodel_peer.py WORK

    WORK/request.json   folder, input_ids, bits, group_size, options     WORK/quantised/   the folder it has saved
                                                                         WORK/answer.json  versions, seconds
It imports nothing of this project: see `interop_peer` beside it, whose environment this is.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "gptqmodel")


def main(work: Path) -> None:
    """Answer the request in a folder."""
    # Nothing here is worth a download or compiling; it takes more workers than cores if it is left to itself.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TORCHDYNAMO_DISABLE": "1"}
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch

    gptqmodel: Any = importlib.import_module("gptqmodel")
    asked = json.loads((work / "request.json").read_text(encoding="utf-8"))
    config = gptqmodel.QuantizeConfig(
        bits=asked["bits"], group_size=asked["group_size"], sym=True, desc_act=False, **asked["options"]
    )
    model = gptqmodel.GPTQModel.load(asked["folder"], config, device="cpu", dtype=torch.float32)
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in asked["input_ids"]]
    started = time.perf_counter()
    model.quantize(calibration, batch_size=1)
    seconds = time.perf_counter() - started
    model.save(str(work / "quantised"))
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    (work / "answer.json").write_text(json.dumps({"versions": versions, "seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
