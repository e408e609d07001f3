"""The GPU kernels one by one: right first, then how fast, beside others (`benchmarks speed gpu --only kernels`).

At the shapes of Vicuna-7B. Each op is computed once and compared with its reference; what is wrong is not timed. Then
it is captured in a CUDA graph, as the decoder runs it, once for each of several copies of what it reads: together they
exceed the L2 cache, so each call reads memory as in a decoder, where other layers came in between.

GB/s counts what a call has to read and write, each byte once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from benchmarks.speed.contenders import Contender, contenders
from benchmarks.speed.harness import Clock, Report, Row, Unavailable, reason
from kernels.backend import Selection, select_backend
from lite.engines.torch_engine.cuda_graph import capture_cuda_graph
from lite.errors import BackendUnavailable
from lite.eval.figures import Quantiles, quantiles

if TYPE_CHECKING:
    from benchmarks.speed.gpu.rig import Rig

_FLUSH_BYTES: Final = 256 << 20
"""Read by the copies in turn: more than twice the largest L2 cache (126 MB on a Blackwell card)."""
_MAX_COPIES: Final = 64
_ROUNDS: Final = 50


def measure_one(contender: Contender, *, bandwidth: float) -> Row:
    """Check a contender, then time it beside a streaming read of so many bytes per second."""
    names = {name: getattr(contender, name) for name in ("op", "shape", "engine", "dtype")}
    row = Row(names=names, bandwidth=bandwidth)
    try:
        first = contender.prepare()
        wrong = contender.wrong(first.run())
        if wrong > 1:
            row.why, row.is_wrong = f"off by {wrong:.3g} times what is allowed", True
            return row
        copies = min(_MAX_COPIES, max(2, -(-_FLUSH_BYTES // first.nbytes)))
        calls = [first, *(contender.prepare() for _ in range(copies - 1))]
        row.time, is_captured = time_calls([call.run for call in calls])
    except Exception as error:
        if contender.is_ours and not isinstance(error, Unavailable):
            raise
        row.why = reason(error)
        return row
    row.nbytes, row.figures["graph"] = first.nbytes, is_captured
    if not is_captured:
        row.cells["captured"] = "no"
    return row


def time_calls(calls: Sequence[Callable[[], Tensor]]) -> tuple[Quantiles, bool]:
    """Run all calls one after the other, again and again, and divide.

    Returns:
        The time of a call, and whether they could be captured in a CUDA graph.
    """

    def run() -> Tensor:
        return [call() for call in calls][-1]

    run()  # compiles, and whatever else happens the first time
    torch.cuda.synchronize()
    try:
        repeat = capture_cuda_graph(run, device=torch.device("cuda", torch.cuda.current_device()))
        is_captured = True
    except RuntimeError:
        torch.cuda.synchronize()
        repeat, is_captured = run, False
    for _ in range(3):
        repeat()
    clock = Clock(on_gpu=True)
    clock.mark()
    for _ in range(_ROUNDS):
        repeat()
        clock.mark()
    return quantiles([seconds / len(calls) for seconds in clock.seconds()]), is_captured


def measure(rig: Rig, report: Report) -> None:
    """Measure every contender."""
    rig.forget_decoder()
    bandwidth = report.figures["bandwidth_bytes_per_s"] = rig.measured_bandwidth()
    report.notes += [
        f"Bandwidth of a streaming read just before: {bandwidth / 1e9:,.0f} GB/s. Medians of {_ROUNDS} rounds over "
        "several copies, from a CUDA graph. Copies of the small ops (add_rms_norm, silu_mul, rotary_and_cache) stay "
        "within the L2 cache, as what they read does in a decoder.",
        "captured: what cannot be, in a CUDA graph, is launched one by one, which Python may have slowed down.",
    ]
    torch.manual_seed(0)
    setting = rig.setting
    with torch.no_grad():  # no inference mode: captures are made outside it
        rows = sorted({min(setting.rows), max(setting.rows)})
        for contender in contenders(setting.shapes, rows, rig.device, setting.context):
            report.add(measure_one(contender, bandwidth=bandwidth), ours=contender.is_ours)
            rig.tidy()


def find_gpu() -> tuple[torch.device, Selection]:
    """Return the current GPU, and why the kernels run there.

    Raises:
        BackendUnavailable: there is no GPU, or the kernels do not run on it.
    """
    if not torch.cuda.is_available():
        msg = (
            f"got no GPU that torch {torch.__version__} sees · expected an NVIDIA GPU · run this on a machine with one"
        )
        raise BackendUnavailable(msg)
    device = torch.device("cuda", torch.cuda.current_device())
    selection = select_backend(device)
    if selection.backend != "triton" or selection.is_fallback:
        msg = f"got no kernels ({selection.reason}) · expected Triton's on {device} · install what is missing"
        raise BackendUnavailable(msg)
    return device, selection
