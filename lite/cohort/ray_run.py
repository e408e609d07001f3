"""A cohort on many machines: Ray Data starts the workers, replaces those that die, and moves studies and results.

    studies ──blocks──▶ Drafter, one a GPU or so many cores ──lines──▶ a folder beside the journal ──▶ journal
      here                 on all nodes: artifact and films            here, each file committed        here

Ray commits a file in two phases: which ids it is to hold, then the file, then that it is whole. Only what is committed
is taken over, while the others go on, and by the rules of the journal: each study once. After a kill, of whatever
process, what was committed is taken over first, and only the rest is drafted.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Final

from lite.cohort.committed import Committed
from lite.cohort.worker import Drafter, Work
from lite.errors import BackendUnavailable, LiteError

try:
    # Read with the module, and by a Ray that is started here: tell nobody, say little, start nothing again that has
    # been ended, and keep the processes that read and write, which have nothing to do most of the time.
    for name, value in (
        ("USAGE_STATS_ENABLED", "0"),
        ("BACKEND_LOG_LEVEL", "fatal"),
        ("ENABLE_AUTO_CONNECT", "0"),
        ("idle_worker_killing_time_threshold_ms", "3600000"),
    ):
        os.environ.setdefault(f"RAY_{name}", value)
    import ray
    import ray.data
    from ray.data.checkpoint import CheckpointConfig
except ImportError as error:
    missing = f"got --ray and no Ray Data ({error}) · expected it here and on all nodes · pip install"
    raise BackendUnavailable(f"{missing} 'llava-rad-lite[ray]'") from error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lite.cohort.run import Extras, Listener
    from lite.studies.journal import Journal
    from lite.studies.study import Study

LOCAL: Final = "local"
TRIES: Final = 3
"""Workers that may die of a block of studies, and then of each of them alone."""
MAX_LOST_BLOCKS: Final = 20
"""When so many have been given up, the workers are at fault, and the run ends."""
BATCHES_A_BLOCK: Final = 8
"""At most: a worker's rows run empty at the end of a block, and a worker that dies loses its block."""
BLOCKS_A_WORKER: Final = 4
"""At least, where there are as many studies, so that all workers end at about the same time."""
_SECONDS_BETWEEN_LOOKS: Final = 0.5
_BYTES_A_BLOCK: Final = 1 << 20  # Ray reckons with what a task may return: lines are small
_LOCAL_STORE_BYTES: Final = 256 << 20


def draft_on_ray(
    work: Work,
    studies: Sequence[Study],
    journal: Journal,
    *,
    address: str = LOCAL,
    cores: int | None = None,
    extras: Extras,
    told: Listener,
) -> None:
    """Draft studies on a Ray cluster, and write each result when it is there.

    Args:
        work: what the workers do.
        studies: those that are not in the journal yet, of films in files.
        journal: open.
        address: of the cluster, as `ray.init` takes it; "local" starts one here.
        cores: how many each worker has; None: all of the smallest node. Not asked where there are GPUs: it is one each.
        extras: what is written beside, here.
        told: of each study, once its line is written.

    Raises:
        LiteError: no cluster is there, or the workers cannot work; or the journal is of other settings.
    """
    sink = Committed(journal, studies, artifact_id=work.artifact_id, request=work.request, extras=extras, told=told)
    sink.take(failures=False)  # of a run that was killed
    sink.clear()
    if not sink.left:
        return
    with _cluster(address):
        workers, resources = _pool(work, cores)
        fair = math.ceil(len(sink.left) / workers / BLOCKS_A_WORKER)
        for number, size in enumerate((max(work.batch_size, min(fair, BATCHES_A_BLOCK * work.batch_size)), 1)):
            if sink.left:
                folder = sink.prepare(number, size)
                _Follower.sink = sink
                try:
                    _run(work, folder, size, workers, resources)
                except LiteError:
                    raise
                except Exception as error:
                    got = next((line for line in reversed(str(error).splitlines()) if line.strip()), repr(error))
                    msg = f"Ray: got {type(error).__name__}: {got.strip()} · expected workers that draft"
                    raise LiteError(f"{msg} · see Ray's logs; the same command goes on") from error
                sink.take()
        sink.give_up()
    sink.clear()


class _Follower:
    """What Ray calls at each of its steps. It makes one itself, so what to follow is told to the class."""

    sink: ClassVar[Committed]

    def __init__(self) -> None:
        self._next = 0.0

    def before_execution_starts(self, *_: object) -> None: ...

    def on_execution_step(self, *_: object) -> None:
        """Take over what is committed, now and then. What it raises ends the run."""
        if time.monotonic() >= self._next:
            self.sink.take()
            self._next = time.monotonic() + _SECONDS_BETWEEN_LOOKS

    def after_execution_succeeds(self, *_: object) -> None: ...

    def after_execution_fails(self, *_: object) -> None: ...


def _run(work: Work, folder: Path, size: int, workers: int, resources: dict[str, float]) -> None:
    """Have the workers draft the blocks of a folder, and their lines committed beside it."""
    blocks = len(list((folder / "studies").iterdir()))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [_Follower]
    context.max_errored_blocks = MAX_LOST_BLOCKS
    context.target_max_block_size = _BYTES_A_BLOCK
    context.checkpoint_config = CheckpointConfig("id", str(folder / "committed"), delete_checkpoint_on_success=False)
    # Only the workers take cores, or they would wait for what waits for them. The folder is on this machine's disk.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    read = ray.data.read_json(
        str(folder / "studies"), lines=True, override_num_blocks=blocks, concurrency=1, num_cpus=0, label_selector=here
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no other name for max_task_retries yet, and there are few blocks
        drafted = read.map_batches(
            Drafter,
            fn_constructor_args=(work,),
            batch_size=size,  # as the blocks are
            compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
            max_restarts=-1,
            max_task_retries=TRIES - 1,
            **resources,
        )
        drafted.write_json(
            str(folder / "lines"), concurrency=1, ray_remote_args={"num_cpus": 0, "label_selector": here}
        )


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[None]:
    """Connect to a cluster, or start one here."""
    if ray.is_initialized():  # by whoever calls this: it is theirs to end
        yield
        return
    expected = "expected a cluster that this machine belongs to · run: ray start --address=HEAD:PORT, or leave it out"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        if address == LOCAL:
            ray.init(LOCAL, include_dashboard=False, object_store_memory=_LOCAL_STORE_BYTES, **quiet)
        else:
            _check_reachable(address)
            ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise LiteError(f"got --ray {address}: {str(error).strip() or repr(error)} · {expected}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ask for a connection: Ray itself would go on trying."""
    host, colon, port = address.rpartition(":")
    if "://" in address:
        msg = "a client's address, not a node's"
        raise ValueError(msg)
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _pool(work: Work, cores: int | None) -> tuple[int, dict[str, float]]:
    """Return how many workers there are room for, and what each takes."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    device = work.options["device"]
    if device != "cpu" and gpus:
        return gpus, {"num_gpus": 1, "num_cpus": cores or 1}
    if device.startswith("cuda"):
        msg = f"got --device {device} and a cluster without GPUs · expected some · leave --device out"
        raise LiteError(msg)
    cores = cores or min(cpus, default=1)
    workers = sum(count // cores for count in cpus)
    if not workers:
        msg = f"got --ray-cores {cores} and nodes of {', '.join(map(str, sorted(cpus))) or 'no'} cores · expected"
        raise LiteError(f"{msg} a node of as many · give fewer")
    return workers, {"num_cpus": cores}
